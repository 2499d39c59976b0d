"""The project's documents, taken apart: fenced blocks, shell commands, code spans, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.support.paths import REPOSITORY

CODE = ("cluster", "compress_jobs", "serve_app", "infra")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Document:
    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(REPOSITORY))

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def prose(self) -> str:
        return _FENCE.sub("", self.text)

    def blocks(self, language: str | None = None) -> list[str]:
        return [body for name, body in _FENCE.findall(self.text) if language in (None, name)]

    @property
    def languages(self) -> set[str]:
        return {name for name, _ in _FENCE.findall(self.text)}

    def commands(self) -> list[list[str]]:
        """The commands of all shell blocks, as words, in order."""
        return [words for block in self.blocks("sh") for words in _commands(block)]

    def spans(self) -> list[str]:
        return _SPAN.findall(self.prose)

    def links(self) -> list[str]:
        return _LINK.findall(_SPAN.sub("", self.prose))

    def anchors(self) -> set[str]:
        """Of its headings, as they are made on a page: lower case, spaces to dashes, other signs left out."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def all_documents() -> list[Document]:
    found = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/README.md")]
    return [Document(path) for path in (*found, *sorted(p for name in CODE for p in (REPOSITORY / name).rglob("*.md")))]


def _commands(block: str) -> list[list[str]]:
    found, pending = [], ""
    for line in block.splitlines():
        pending += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        if words := shlex.split(pending, comments=True):
            found.append(words)
        pending = ""
    assert not pending, f"a shell block ends in a backslash: {block}"
    return found
