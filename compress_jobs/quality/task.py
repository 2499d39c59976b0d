"""Held-out rows of adapters, from a file.

A row's prompt is ``Q: {question}\\nA:`` and its answer `` {answer}\\n``, the form the shipped adapters were trained in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.errors import ConfigError
from cluster.hashing import canonical_json
from compress_jobs.host.text import read_text


@dataclass(frozen=True)
class Task:
    """Held-out rows of one adapter: ``question`` with {x}, and (x, answer) pairs."""

    name: str
    question: str
    rows: tuple[tuple[str, str], ...]

    def prompt(self, x: str) -> str:
        return f"Q: {self.question.format(x=x)}\nA:"


def read_tasks(path: Path, num_rows: int) -> dict[str, Task]:
    """Tasks by adapter id, from JSON lines with name, question and test rows. Raises ConfigError."""
    if num_rows < 1:
        raise ConfigError(f"--rows {num_rows}: expected at least 1")
    text = read_text("--tasks", path, "a file of JSON lines")
    try:
        # Not splitlines: what else that takes for a line's end may stand in a string.
        documents = [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        tasks = [Task(d["name"], d["question"], tuple((x, y) for x, y in d["test"][:num_rows])) for d in documents]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        seen = f"key {error} is missing" if isinstance(error, KeyError) else f"a line of another form ({error})"
        raise ConfigError(f"--tasks {path}: {seen}; expected JSON lines with name, question and test") from None
    if not tasks:
        raise ConfigError(f"--tasks {path}: no task in it; expected JSON lines with name, question and test")
    for task in tasks:
        if not task.rows:
            raise ConfigError(f"--tasks {path}: task {task.name!r} has no test rows; add some, or remove the task")
    return {task.name: task for task in tasks}


def hash_tasks(tasks: Mapping[str, Task]) -> str:
    return "sha256:" + hashlib.sha256(canonical_json([asdict(tasks[name]) for name in sorted(tasks)])).hexdigest()
