"""Progress of long work: a bar on a terminal, plain lines in a job's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 5.0


def track(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield ``items``, telling on stderr how many of ``total`` have gone by."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, leave=True)
        return
    began = told = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if count == total or now - told >= _SECONDS_BETWEEN_LINES:
            told = now
            say(f"{what}: {count}/{total} in {now - began:.0f} s")


def say(*lines: str) -> None:
    """Lines of the job's log (stderr: stdout is for the result)."""
    for line in lines:
        print(line, file=sys.stderr, flush=True)
