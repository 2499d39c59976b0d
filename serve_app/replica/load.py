"""A replica's load as Serve's autoscaler is told it: its mean since it was last asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class LoadMeter:
    """Semantics: ``take`` = (integral of the sequences that ran or waited, over the time since the last ``take``) /
    that time. So a short request between two of them counts as well, by as much as it was there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_sequences = 0
        self._integral = 0.0
        self._counted_at = self._taken_at = clock()

    @contextmanager
    def counting(self, num_sequences: int) -> Iterator[None]:
        self._count(num_sequences)
        try:
            yield
        finally:
            self._count(-num_sequences)

    def take(self) -> float:
        self._count(0)
        elapsed_s = self._counted_at - self._taken_at
        mean = self._integral / elapsed_s if elapsed_s > 0 else float(self._num_sequences)
        self._integral, self._taken_at = 0.0, self._counted_at
        return mean

    def _count(self, change: int) -> None:
        now = self._clock()
        self._integral += self._num_sequences * (now - self._counted_at)
        self._num_sequences, self._counted_at = self._num_sequences + change, now
