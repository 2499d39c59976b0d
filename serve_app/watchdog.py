"""A process whose event loop hangs ends itself.

Serve sees that too and starts another, but asks the one that hangs to stop first, and waits for that as long as a
request may take: so long who it was answering would wait. One that has ended is known to be gone at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import traceback

TICK_S = 1.0
# Before Serve gives it up, after three checks of HEALTH_CHECK_TIMEOUT_S (app.py).
MOST_MISSED = 15

logger = logging.getLogger("ray.serve")


class Watchdog:
    """Ticks are counted, not seconds: a process that was stopped, or gets no CPU, has missed none when it goes on."""

    def __init__(self) -> None:
        self._num_beats = 0

    async def run(self) -> None:
        """For ever, in the loop that is watched; for as long as that runs."""
        over, loop = threading.Event(), threading.get_ident()
        threading.Thread(target=self._watch, args=(loop, over), name="watchdog", daemon=True).start()
        try:
            while True:
                self._num_beats += 1
                await asyncio.sleep(TICK_S / 2)
        finally:
            over.set()

    def _watch(self, loop: int, over: threading.Event) -> None:
        seen = num_missed = 0
        while num_missed < MOST_MISSED:
            if over.wait(TICK_S):
                return
            num_missed = num_missed + 1 if self._num_beats == seen else 0
            seen = self._num_beats
        stands_at = "".join(traceback.format_stack(sys._current_frames().get(loop)))
        logger.error("the event loop hangs, and this process ends; it stands at\n%s", stands_at)
        os._exit(1)
