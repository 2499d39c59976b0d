"""How fast a group gets on, and so when it has room again."""

from __future__ import annotations

import math
from collections import deque

NUM_LAST = 20
# Clients of OpenAI's heed no longer wait.
MOST_S = 60


class Pace:
    """Of one router's requests in one group."""

    def __init__(self) -> None:
        self._ended: deque[tuple[int, float]] = deque(maxlen=NUM_LAST)

    def end(self, num_sequences: int, took_s: float) -> None:
        """A request of so many sequences has ended; ``took_s``: since it was admitted, its wait included."""
        self._ended.append((num_sequences, took_s))

    def wait_s(self, num_ahead: int, num_inflight: int) -> int:
        """Whole seconds until ``num_ahead`` of ``num_inflight`` sequences have ended: as many are in flight as end in
        the time that one takes (Little's law), of the last NUM_LAST requests on the average. From 1 to MOST_S."""
        num_ended = sum(number for number, _ in self._ended)
        if not num_ended or not num_inflight:
            return 1
        took_s = sum(number * took_s for number, took_s in self._ended) / num_ended
        return max(1, min(MOST_S, math.ceil(num_ahead * took_s / num_inflight)))
