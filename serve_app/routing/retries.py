"""How often a request may be asked again elsewhere: so seldom that an outage is not made worse by it."""

from __future__ import annotations

import time
from collections import deque

SHARE, LEAST, WINDOW_S = 0.1, 3, 10.0


class RetryBudget:
    """Semantics: of the last WINDOW_S seconds' requests SHARE are asked again at most, or LEAST where that is more."""

    def __init__(self) -> None:
        self._asked: deque[float] = deque()
        self._again: deque[float] = deque()

    def count(self) -> None:
        """A request was asked."""
        self._asked.append(self._now())

    def take(self) -> bool:
        """Whether one may be asked again, which is counted then."""
        now = self._now()
        if len(self._again) >= max(LEAST, SHARE * len(self._asked)):
            return False
        self._again.append(now)
        return True

    def _now(self) -> float:
        now = time.monotonic()
        for times in (self._asked, self._again):
            while times and times[0] < now - WINDOW_S:
                times.popleft()
        return now
