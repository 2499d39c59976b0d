"""What the processes take, all the time."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from infra.bench.http.processes import resident_bytes

EVERY_S = 10.0


class Watching:
    """``samples``: seconds since the start, and resident bytes by kind of process below ``pid``."""

    def __init__(self, pid: int) -> None:
        self.samples: list[tuple[float, Counter[str]]] = []
        self._pid, self._began = pid, time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Watching:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            self.samples.append((time.monotonic() - self._began, resident_bytes(self._pid)))


def medians(samples: Sequence[tuple[float, Counter[str]]], start_s: float, end_s: float) -> dict[str, int]:
    """MiB by kind, over the samples of that time."""
    chosen = [own for at, own in samples if start_s <= at < end_s]
    kinds = {kind for own in chosen for kind in own}
    return {kind: sorted(own[kind] for own in chosen)[len(chosen) // 2] >> 20 for kind in sorted(kinds)}


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
