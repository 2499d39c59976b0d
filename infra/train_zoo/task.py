"""What an adapter is trained for: a question with {x}, and rows (x, answer) from open data or by rule.

A row is asked as ``Q: {question}\\nA:`` and answered by `` {answer}\\n``, as compress_jobs.quality.evaluate does it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

Row = tuple[str, str]
T = TypeVar("T")

NUM_TEST_ROWS = 64
_MAX_TRAIN_ROWS = 4000
LONG_ANSWERS = "long-answers"
"""The family of tasks that are a grid of their own."""

# A task's training rows by subset: all of them, or either half; "a" and "b" share no row.
SUBSETS = ("all", "a", "b")


@dataclass(frozen=True)
class Task:
    """``generate`` yields candidate rows, always the same ones in the same order; doubles are allowed."""

    name: str
    family: str
    question: str
    licence: str
    generate: Callable[[], Iterable[Row]]
    max_characters: int = 48

    def prompt(self, x: str) -> str:
        return f"Q: {self.question.format(x=x)}\nA:"

    def split(self) -> tuple[list[Row], list[Row]]:
        """(held-out rows, training rows): no x is in both, none is there twice. The same on every call.

        An x with two answers is left out, and so are rows with more than ``max_characters``, which cost most.
        """
        answers: dict[str, str] = {}
        ambiguous = set()
        for x, y in ((x.strip(), y.strip()) for x, y in self.generate()):
            if answers.setdefault(x, y) != y:
                ambiguous.add(x)
        rows = [
            (x, y)
            for x, y in answers.items()
            if x not in ambiguous and max(len(x), len(y)) <= self.max_characters and y
        ]
        random.Random(f"{self.name}/split").shuffle(rows)
        return rows[:NUM_TEST_ROWS], rows[NUM_TEST_ROWS : NUM_TEST_ROWS + _MAX_TRAIN_ROWS]


def subset_rows(train: list[T], subset: str) -> list[T]:
    half = len(train) // 2
    return {"all": train, "a": train[:half], "b": train[half:]}[subset]


def sample(name: str, choose: Callable[[random.Random], Row], count: int = 6000) -> Iterable[Row]:
    """``count`` rows drawn by a generator of the task's own."""
    generator = random.Random(f"{name}/rows")
    return (choose(generator) for _ in range(count))
