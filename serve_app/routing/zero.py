"""A group without a replica that is not lost: who wants it, and the call that wakes it.

Serve wakes a deployment for which a call is queued. A request's own would end with the request, and where requests do
not wait there is none: so the router queues one call for all, as long as somebody wants the group.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from serve_app.openai.errors import unavailable

# Until it has been measured: what a client is told to wait.
FIRST_COLD_START_S = 30.0

logger = logging.getLogger("ray.serve")


class Zero:
    """Of the group ``name``. ``does``: what a request does that finds no replica: ``wait`` for the one it wakes, or
    ``refuse``, a 503 that says when to come back; None: the group never goes to zero. ``call`` makes the call that
    Serve queues. ``cold_start_s``: how long waking took the last time, from the request to when a replica said that it
    lives. Times are the event loop's.
    """

    def __init__(self, name: str, does: str | None, call: Callable[[], Any]) -> None:
        self._name, self._does, self._call = name, does, call
        self.is_possible, self.is_now = does is not None, False
        self.cold_start_s: float | None = None
        self._wanted_at, self._wanted_until = 0.0, 0.0
        self._waking: asyncio.Task[None] | None = None
        self._is_there = asyncio.Event()

    @property
    def is_asleep(self) -> bool:
        """At zero, and nobody wants it."""
        return self.is_now and self._waking is None

    def want(self, deadline: float) -> None:
        """A request does, which would be answered until ``deadline``. Raises ApiError (503) where it is not to wait."""
        now = asyncio.get_running_loop().time()
        if now >= self._wanted_until:
            self._wanted_at = now
        self._wanted_until = max(self._wanted_until, deadline)
        if self._does == "refuse":
            after_s = math.ceil(self.cold_start_s or FIRST_COLD_START_S)
            raise unavailable(f"{self._name} was at zero and is being woken; try again in {after_s} s", after_s)

    async def end(self) -> None:
        """Returns when a replica has said something."""
        await self._is_there.wait()

    def be(self) -> str:
        """There is no replica. By a task of the router's own, again and again. Returns what to say of it."""
        self.is_now = True
        self._is_there.clear()
        if asyncio.get_running_loop().time() >= self._wanted_until:
            self._stop_waking()
            return "at zero; a request wakes it"
        # The call may be over, and the replica that answered it gone.
        if self._waking is None or self._waking.done():
            logger.info("%s is at zero, and is being woken", self._name)
            self._waking = asyncio.create_task(self._wake())
        return "it is being woken"

    def leave(self, alive: bool) -> None:
        """A replica has said something: that it lives, or not."""
        if self.is_now and alive and self._waking is not None:
            self.cold_start_s = round(asyncio.get_running_loop().time() - self._wanted_at, 2)
            logger.info("%s is there; waking it took %.2f s", self._name, self.cold_start_s)
        self.is_now, self._wanted_until = False, 0.0
        self._stop_waking()
        self._is_there.set()

    async def _wake(self) -> None:
        response = self._call()
        try:
            await response
        except RequestCancelledError:
            pass
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", self._name, error)
        finally:
            response.cancel()

    def _stop_waking(self) -> None:
        if self._waking is not None:
            self._waking.cancel()
            self._waking = None
