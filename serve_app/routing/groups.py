"""A group as the router sees it: is it there, what does it hold, how much is it asked at once.

Serve queues a call to a deployment without a running replica until there is one, which may be never. So the
router asks each group for its state all the time, answers for a silent one by itself, and gives up waiting
as soon as a group is known to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import HomeUnavailable
from serve_app.engine.home_states import READY
from serve_app.engine.protocol import EngineHealth
from serve_app.openai.call import Call, Reply
from serve_app.openai.errors import overloaded

POLL_INTERVAL_S = 1.0
# A busy replica on few cores may be slow to say how it is; its chunks count as signs of life too.
SILENCE_S = 10.0

T = TypeVar("T")
logger = logging.getLogger("ray.serve")


class GroupClient:
    """``num_inflight`` sequences of this router run or wait in the group; never more than ``max_inflight``."""

    def __init__(self, name: str, homes: Sequence[str], handle: DeploymentHandle[Any], max_inflight: int) -> None:
        self.name, self.homes, self.max_inflight = name, tuple(homes), max_inflight
        self.num_inflight = 0
        self.health = EngineHealth(alive=False)
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._reason = "starting"
        self._seen_at = time.monotonic()
        self._gone = asyncio.Event()
        self._gone.set()

    @property
    def alive(self) -> bool:
        return not self._gone.is_set()

    def home_state(self, home: str) -> str:
        """READY, or why the home cannot be asked."""
        if not self.alive:
            return self.health.homes.get(home, f"{self.name}: {self._reason}")
        return self.health.homes.get(home, f"{self.name} does not hold it")

    def adapter_state(self, served: ServedAdapter) -> str:
        """READY, or why the adapter cannot be asked: its home's reason, or its own."""
        state = self.home_state(served.home)
        return self.health.adapters.get(served.adapter_id, READY) if state == READY else state

    def check(self, served: ServedAdapter | None) -> None:
        """Raises HomeUnavailable when the adapter (None: the base) cannot be asked."""
        if served is not None and (state := self.adapter_state(served)) != READY:
            own = served.adapter_id if self.home_state(served.home) == READY else served.home
            raise HomeUnavailable(f"{own} is not being served: {state}")
        if not self.alive:
            raise HomeUnavailable(f"{self.name}: {self._reason}")

    async def watch(self) -> None:
        """Keep ``health`` true, for ever."""
        while True:
            await self.refresh()
            await asyncio.sleep(POLL_INTERVAL_S)

    async def refresh(self) -> None:
        """Ask a replica how it is."""
        response = self._handle.status.remote()
        try:
            health: EngineHealth = await asyncio.wait_for(_awaited(response), SILENCE_S)
        except TimeoutError:
            response.cancel()
            if time.monotonic() - self._seen_at >= SILENCE_S:
                self._lose("no answer; it is starting, or being replaced")
        except Exception as error:  # whatever it is: a group that cannot be asked cannot be used
            logger.warning("%s: %s", self.name, error)
            self._lose("its replica is lost, another is being started")
        else:
            self._seen_at = time.monotonic()
            self.health = health
            if health.alive:
                self._gone.clear()
            else:
                self._reason = next(iter(health.homes.values()), "no engine is running")
                self._gone.set()

    async def answer(self, call: Call, num_sequences: int) -> Reply:
        """The whole answer, in one message. Raises ApiError (429) beyond ``max_inflight``, and HomeUnavailable when the
        group is lost."""
        with self._admitted(num_sequences):
            response = self._handle.answer.remote(call)
            async with self._unless_gone(response) as wait:
                reply: Reply = await wait(_awaited(response))
                return reply

    async def stream(self, call: Call, num_sequences: int) -> AsyncGenerator[Reply | bytes, None]:
        """What the replica says, message by message. Closing it stops the replica. Raises as ``answer`` does."""
        with self._admitted(num_sequences):
            response = self._stream.stream.remote(call)
            async with self._unless_gone(response) as wait:
                while (piece := await wait(_next(response))) is not None:
                    self._seen_at = time.monotonic()
                    yield piece

    @contextmanager
    def _admitted(self, num_sequences: int) -> Iterator[None]:
        if self.num_inflight + num_sequences > self.max_inflight:
            raise overloaded(
                f"{self.name} has {self.num_inflight} sequences in flight of {self.max_inflight}; try again later"
            )
        self.num_inflight += num_sequences
        try:
            yield
        finally:
            self.num_inflight -= num_sequences

    @asynccontextmanager
    async def _unless_gone(self, response: Any) -> AsyncIterator[Callable[[Coroutine[Any, Any, T]], Awaitable[T]]]:
        """How to wait for a part of ``response``; it is cancelled at the end. Raises HomeUnavailable as soon as the
        group is known to be gone."""
        gone = asyncio.ensure_future(self._gone.wait())

        async def wait(part: Coroutine[Any, Any, T]) -> T:
            step = asyncio.ensure_future(part)
            try:
                await asyncio.wait({step, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    raise HomeUnavailable(f"{self.name}: {self._reason}")
                return step.result()
            finally:
                step.cancel()

        try:
            yield wait
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", self.name, error)
            self._lose("its replica is lost, another is being started")
            raise HomeUnavailable(f"{self.name}: {self._reason}") from None
        finally:
            gone.cancel()
            # Serve cancels a child only when the whole HTTP request is.
            response.cancel()

    def _lose(self, reason: str) -> None:
        self._reason = reason
        self.health = EngineHealth(alive=False)
        self._gone.set()


async def _next(response: Any) -> Reply | bytes | None:
    """None at the end: StopAsyncIteration cannot leave a task, and nobody waits for one we cancelled."""
    try:
        piece: Reply | bytes = await anext(response)
    except (StopAsyncIteration, RequestCancelledError):
        return None
    return piece


async def _awaited(response: Any) -> Any:
    try:
        return await response
    except RequestCancelledError:
        raise asyncio.CancelledError from None  # by us: nobody waits any more
