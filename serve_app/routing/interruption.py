"""How a call that waits for a replica is ended from outside."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class Interruption(AbstractContextManager["Interruption"]):
    """Of one call: it ends at ``deadline`` (the event loop's time) with TimeoutError, or before with what ``end`` is
    given. Costs a timer a call and nothing a wait: a task and a timer for each piece of a stream took a fifth of the
    router's time."""

    def __init__(self, deadline: float) -> None:
        self._reason: Exception | None = None
        self._waiting: asyncio.Task[object] | None = None
        self._timer = asyncio.get_running_loop().call_at(deadline, self.end, TimeoutError())

    async def wait(self, part: Coroutine[Any, Any, T]) -> T:
        """Its result. Raises the reason as soon as there is one; where it is there already, the part does not begin."""
        task = asyncio.current_task()
        assert task is not None
        if (ended := self._why()) is not None:
            part.close()
            raise ended
        self._waiting = task
        try:
            return await part
        except asyncio.CancelledError:
            # Of the task's cancellations one is ours; where there is another it goes on, as in asyncio.timeout.
            if (ended := self._why()) is None or task.uncancel() > 0:
                raise
            raise ended from None
        finally:
            self._waiting = None

    def _why(self) -> Exception | None:
        return self._reason

    def end(self, reason: Exception) -> None:
        """The first reason counts."""
        if self._reason is None:
            self._reason = reason
            if self._waiting is not None:
                self._waiting.cancel()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()
