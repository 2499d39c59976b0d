"""A group as the router sees it: is it there, what does it hold, how much is it asked at once.

Serve queues a call to a deployment without a running replica until there is one, which may be never. So the
router asks each group for its state all the time, answers for a silent one by itself, and gives up waiting
as soon as a group is known to be gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import HomeUnavailable
from serve_app.engine.home_states import READY
from serve_app.engine.protocol import EngineHealth
from serve_app.openai.call import Call, Carried, Reply
from serve_app.openai.errors import overloaded
from serve_app.routing.carrying import Carrying, carried
from serve_app.routing.interruption import Interruption

POLL_INTERVAL_S = 1.0
# A busy replica on few cores may be slow to say how it is; its chunks count as signs of life too.
SILENCE_S = 10.0

logger = logging.getLogger("ray.serve")


class GroupClient:
    """``num_inflight`` sequences of this router run or wait in the group; never more than ``max_inflight``."""

    def __init__(
        self, name: str, homes: Sequence[str], handle: DeploymentHandle[Any], max_inflight: int, router: str
    ) -> None:
        self.name, self.homes, self.max_inflight = name, tuple(homes), max_inflight
        self.num_inflight = 0
        self.health = EngineHealth(alive=False)
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._reason = "starting"
        self._seen_at = time.monotonic()
        self._calls: set[Interruption] = set()
        self.carrying = Carrying(name, lambda: self._stream.carry.remote(router), self._saw, self._lose_replica)
        self.alive = False

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
            self._lose_replica()
        else:
            self._seen_at = time.monotonic()
            self.health = health
            self.alive = health.alive
            if not health.alive:
                self._end_calls(next(iter(health.homes.values()), "no engine is running"))

    async def answer(self, call: Call, deadline: float) -> Reply:
        """The whole answer, in one message. Raises ApiError (429) beyond ``max_inflight``, HomeUnavailable when the
        group is lost, and TimeoutError at ``deadline`` (the event loop's time)."""
        with self._admitted(call.num_sequences):
            response = self._handle.answer.remote(call)
            with self._ending(response, deadline) as interruption:
                reply: Reply = await interruption.wait(_awaited(response))
                return reply

    async def stream(self, call: Call, deadline: float) -> AsyncGenerator[Reply | bytes, None]:
        """What the replica says, message by message. Closing it stops the replica. Raises as ``answer`` does."""
        with self._admitted(call.num_sequences):
            response = self._stream.stream.remote(call)
            with (
                self._ending(response, deadline) as interruption,
                self.carrying.expecting(call.answer_id) as queue,
            ):
                piece = await interruption.wait(_next(response))
                if isinstance(piece, Carried):
                    self._saw()
                    yield piece.piece
                    async with aclosing(carried(queue, response, interruption)) as pieces:
                        async for own in pieces:
                            yield own
                    return
                if isinstance(piece, bytes):
                    self.carrying.want()
                while piece is not None:
                    self._saw()
                    yield piece
                    piece = await interruption.wait(_next(response))

    def _saw(self) -> None:
        self._seen_at = time.monotonic()

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

    @contextmanager
    def _ending(self, response: Any, deadline: float) -> Iterator[Interruption]:
        """How to wait for a part of ``response``, which is cancelled at the end. Raises HomeUnavailable as soon as the
        group is known to be gone."""
        try:
            with Interruption(deadline) as interruption:
                self._calls.add(interruption)
                try:
                    yield interruption
                finally:
                    self._calls.discard(interruption)
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            logger.warning("%s: %s", self.name, error)
            self._lose_replica()
            raise HomeUnavailable(f"{self.name}: {self._reason}") from None
        finally:
            # Serve cancels a child only when the whole HTTP request is.
            response.cancel()

    def _lose_replica(self) -> None:
        self._lose("its replica is lost, another is being started")

    def _lose(self, reason: str) -> None:
        self.health = EngineHealth(alive=False)
        self.alive = False
        self._end_calls(reason)

    def _end_calls(self, reason: str) -> None:
        self._reason = reason
        for call in self._calls:
            call.end(HomeUnavailable(f"{self.name}: {reason}"))


async def _next(response: Any) -> Any:
    """None at the end, and where it was cancelled: nobody waits any more."""
    try:
        return await anext(response)
    except (StopAsyncIteration, RequestCancelledError):
        return None


async def _awaited(response: Any) -> Any:
    try:
        return await response
    except RequestCancelledError:
        raise asyncio.CancelledError from None  # by us: nobody waits any more
