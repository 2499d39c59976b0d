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
        tasks = [Task(d["name"], d["question"], tuple(map(_row, d["test"][:num_rows]))) for d in documents]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        seen = f"key {error} is missing" if isinstance(error, KeyError) else f"a line of another form ({error})"
        raise ConfigError(f"--tasks {path}: {seen}; expected JSON lines with name, question and test") from None
    if not tasks:
        raise ConfigError(f"--tasks {path}: no task in it; expected JSON lines with name, question and test")
    found: dict[str, Task] = {}
    for task in tasks:
        _check(task, f"--tasks {path}: task {task.name!r}")
        if task.name in found:
            raise ConfigError(f"--tasks {path}: task {task.name!r} is there twice; keep one of the two")
        found[task.name] = task
    return found


def _row(row: object) -> tuple[str, str]:
    if not isinstance(row, list) or len(row) != 2:
        raise ValueError(f"row {row!r} is no pair of x and answer")
    return row[0], row[1]


def _check(task: Task, where: str) -> None:
    if not task.rows:
        raise ConfigError(f"{where} has no test rows; add some, or remove the task")
    for text in (task.name, task.question, *(text for row in task.rows for text in row)):
        if not isinstance(text, str):
            raise ConfigError(f"{where} has {text!r} where a text is expected: name, question, and each x and answer")
    try:
        task.prompt("x")
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{where} has question {task.question!r} ({type(error).__name__}: {error}); expected a text with {{x}} for "
            "the row's x, and other braces doubled"
        ) from None


def hash_tasks(tasks: Mapping[str, Task]) -> str:
    return "sha256:" + hashlib.sha256(canonical_json([asdict(tasks[name]) for name in sorted(tasks)])).hexdigest()
