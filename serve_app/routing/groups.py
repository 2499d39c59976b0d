"""A group as the router sees it: is it there, what does it hold, how much is it asked at once.

Serve queues a call to a deployment without a running replica until there is one, which may be never. So the
router asks each group for its state all the time, answers for a silent one by itself, and gives up waiting
as soon as a group is known to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import CtsError, HomeUnavailable
from serve_app.engine.home_states import READY
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
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
            health = await asyncio.wait_for(_awaited(response), SILENCE_S)
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

    async def generate(
        self, requests: Sequence[GenerationRequest]
    ) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """All ``requests`` at once; (index, chunk) as they come. Closing it, or one failure, stops them all.

        Raises ApiError (429) beyond ``max_inflight``, HomeUnavailable when the group is lost, and what the
        engine raises.
        """
        if self.num_inflight + len(requests) > self.max_inflight:
            raise overloaded(
                f"{self.name} has {self.num_inflight} sequences in flight of {self.max_inflight}; try again later"
            )
        self.num_inflight += len(requests)
        try:
            async with aclosing(merge([self._generate(request) for request in requests])) as chunks:
                async for indexed in chunks:
                    yield indexed
        finally:
            self.num_inflight -= len(requests)

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        response = self._stream.generate.remote(request)
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            while True:
                step = asyncio.ensure_future(_next(response))
                try:
                    await asyncio.wait({step, gone}, return_when=asyncio.FIRST_COMPLETED)
                    if not step.done():
                        raise HomeUnavailable(f"{self.name}: {self._reason}")
                finally:
                    step.cancel()
                item = step.result()
                if item is None:
                    return
                if isinstance(item, CtsError):
                    raise item
                self._seen_at = time.monotonic()
                yield item
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", self.name, error)
            self._lose("its replica is lost, another is being started")
            raise HomeUnavailable(f"{self.name}: {self._reason}") from None
        finally:
            gone.cancel()
            # Serve cancels a child only when the whole HTTP request is: this one may have company.
            response.cancel()

    def _lose(self, reason: str) -> None:
        self._reason = reason
        self.health = EngineHealth(alive=False)
        self._gone.set()


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The elements of all ``streams`` with their stream's index, as they come.

    The first error ends it. However it ends, every stream has been closed when it has.
    """
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def drain(index: int, stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait((index, item))
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(drain(index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _next(response: Any) -> GenerationChunk | CtsError | None:
    """None at the end: StopAsyncIteration cannot leave a task, and nobody waits for one we cancelled."""
    try:
        item: GenerationChunk | CtsError = await anext(response)
    except (StopAsyncIteration, RequestCancelledError):
        return None
    return item


async def _awaited(response: Any) -> EngineHealth:
    health: EngineHealth = await response
    return health
