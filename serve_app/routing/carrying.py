"""The router's end of the carriers (``serve_app/replica/carrier.py``): pieces of many streams, handed to each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cluster.errors import HomeUnavailable
from serve_app.openai.call import Reply
from serve_app.routing.interruption import Interruption

GRACE_S = 5.0

Queue = asyncio.Queue[Reply | bytes | None]

logger = logging.getLogger("ray.serve")


class Carrying:
    """Of one group. ``open`` calls a replica for a carrier; ``seen`` is told that something came, ``lost`` that the one
    of a replica broke: nobody knows what it had on it."""

    def __init__(
        self, name: str, open: Callable[[], Any], seen: Callable[[], None], lost: Callable[[str], None]
    ) -> None:
        self._name, self._open, self._seen, self._lost = name, open, seen, lost
        self._queues: dict[str, Queue] = {}
        self._wanted = asyncio.Event()
        self._carriers: set[asyncio.Task[None]] = set()
        self._is_opening = False

    def want(self) -> None:
        """A stream was answered by a replica to which none is open."""
        self._wanted.set()

    async def run(self) -> None:
        """Opens what is wanted, for ever. By a task of the router's: what a request begins would end with it."""
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            if not self._is_opening:
                self._is_opening = True
                task = asyncio.create_task(self._receive())
                self._carriers.add(task)
                task.add_done_callback(self._carriers.discard)

    @contextmanager
    def expecting(self, answer_id: str) -> Iterator[Queue]:
        """What carriers bring for it."""
        queue = self._queues[answer_id] = asyncio.Queue()
        try:
            yield queue
        finally:
            del self._queues[answer_id]

    async def _receive(self) -> None:
        replica, response = None, None
        try:
            response = self._open()
            async for message in response:
                self._seen()
                if replica is None:
                    [(_, name)] = message
                    replica, self._is_opening = name.decode(), False
                    continue
                for answer_id, piece in message:
                    # Of one that was given up something may still be under way.
                    if (queue := self._queues.get(answer_id)) is not None:
                        queue.put_nowait(piece)
        except Exception as error:
            logger.warning("%s: a carrier %s: %s", self._name, "is lost" if replica else "did not open", error)
            if replica is not None:
                self._lost(replica)
        finally:
            self._is_opening = False
            if response is not None:
                response.cancel()


async def carried(queue: Queue, response: Any, interruption: Interruption) -> AsyncGenerator[Reply | bytes, None]:
    """The pieces of ``queue``, to the end; what is there at once as one. ``response`` is the call that began it: while
    that lasts the replica is there, and what it says itself is why the stream has ended too early."""

    async def watch() -> None:
        try:
            async for said in response:
                queue.put_nowait(said)
                return
            # What the carrier had for it is here by now, or never.
            await asyncio.sleep(GRACE_S)
            interruption.end(HomeUnavailable("the end of the answer did not come"))
        except Exception as error:
            interruption.end(error)

    watching = asyncio.ensure_future(watch())
    try:
        while True:
            piece = await interruption.wait(queue.get())
            said = b""
            while isinstance(piece, bytes):
                said += piece
                if queue.empty():
                    break
                piece = queue.get_nowait()
            if said:
                yield said
            if piece is None:
                return
            if isinstance(piece, Reply):
                yield piece
                return
    finally:
        watching.cancel()
