"""Tasks in the background that must not die silently."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

RESTART_S = 1.0

logger = logging.getLogger("ray.serve")


class Supervised:
    """Runs each of ``works`` for ever: one that ends by an error, or at all, is logged, shown in ``failures`` until it
    has run well for a while, and begun again."""

    def __init__(self, works: dict[str, Callable[[], Coroutine[Any, Any, None]]]) -> None:
        self.failures: dict[str, str] = {}
        # Held, because the event loop itself holds its tasks only weakly.
        self._tasks = [asyncio.create_task(self._run(name, work)) for name, work in works.items()]

    async def _run(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            task = asyncio.ensure_future(work())
            forget = asyncio.get_running_loop().call_later(60 * RESTART_S, self.failures.pop, name, None)
            try:
                # Of its own, so that a CancelledError from within ends that task and not this one.
                await asyncio.wait({task})
                error = asyncio.CancelledError() if task.cancelled() else task.exception()
            except asyncio.CancelledError:
                task.cancel()
                raise
            finally:
                forget.cancel()
            self.failures[name] = f"{type(error).__name__}: {error}" if error is not None else "it ended"
            logger.error("background task %s ended, and is begun again: %s", name, self.failures[name], exc_info=error)
            await asyncio.sleep(RESTART_S)

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
