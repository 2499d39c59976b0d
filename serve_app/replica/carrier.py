"""How what streams say goes from a replica to a router: all that is there at once is one message.

A message costs Serve as much as some ten tokens do, and at every step of an engine all its streams have a token. So a
router keeps one stream open to each replica that it asks, by which the pieces of all its others come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve_app.openai.call import Call, Carried, Message, Reply, error_reply
from serve_app.openai.errors import unavailable

# A replica that is to go waits for its calls to end, and this is one.
IDLE_S = 2.0
# Serve takes messages of 4 MiB at most.
MOST_BYTES = 1 << 20


class Carriers:
    """The open ones, by router. ``replica`` is this one's name."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._open: dict[str, _Carrier] = {}

    async def carry(self, router: str) -> AsyncGenerator[Message, None]:
        """The replica's name, then whatever is said. Ends when nothing has used it for a while; after the first message
        where there is one already."""
        if router in self._open:
            yield self._hello()  # Serve takes a stream without any for a failure
            return
        carrier = self._open[router] = _Carrier()
        try:
            yield self._hello()
            async for message in carrier.messages():
                yield message
        finally:
            del self._open[router]
            carrier.lose()

    def _hello(self) -> Message:
        return [("", self._replica.encode())]

    async def send(
        self, call: Call, pieces: AsyncGenerator[Reply | bytes, None]
    ) -> AsyncGenerator[Carried | Reply | bytes, None]:
        """The pieces; but where the router has a carrier open here, only the first of them, as Carried: the others go
        by that, and None at their end."""
        async with aclosing(pieces):
            carrier = self._open.get(call.router)
            first = await anext(pieces, None)
            if carrier is None or carrier.is_lost() or not isinstance(first, bytes):
                for part in _parts(first):
                    yield part
                async for piece in pieces:
                    for part in _parts(piece):
                        yield part
                return
            with carrier:
                begun, *rest = _parts(first)
                assert isinstance(begun, bytes)
                yield Carried(begun, self._replica)
                for part in rest:
                    carrier.say(call.answer_id, part)
                async for piece in pieces:
                    if carrier.is_lost():
                        break
                    for part in _parts(piece):
                        carrier.say(call.answer_id, part)
                carrier.say(call.answer_id, None)
                if carrier.is_lost():
                    yield error_reply(unavailable("the way to the router was lost; try again"))


def _parts(piece: Reply | bytes | None) -> list[Reply | bytes]:
    """Of a size that a message may have; a client does not see where events are cut."""
    if not isinstance(piece, bytes):
        return [] if piece is None else [piece]
    return [piece[start : start + MOST_BYTES] for start in range(0, len(piece), MOST_BYTES)]


class _Carrier:
    """In use as a context, by each stream."""

    def __init__(self) -> None:
        self._is_lost = False
        self._said: Message = []
        self._num_streams = 0
        self._there = asyncio.Event()

    def __enter__(self) -> None:
        self._num_streams += 1

    def __exit__(self, *_: object) -> None:
        self._num_streams -= 1

    def is_lost(self) -> bool:
        return self._is_lost

    def lose(self) -> None:
        self._is_lost = True

    def say(self, answer_id: str, piece: Reply | bytes | None) -> None:
        self._said.append((answer_id, piece))
        self._there.set()

    async def messages(self) -> AsyncGenerator[Message, None]:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    await self._there.wait()
            except TimeoutError:
                # What was said while the time ran out has not been taken yet.
                if self._num_streams == 0 and not self._said:
                    return
                continue
            self._there.clear()
            while self._said:
                yield self._take()

    def _take(self) -> Message:
        """All that has been said, or as much as fits; a piece is of that size at most."""
        size = end = 0
        while end < len(self._said) and size < MOST_BYTES:
            piece = self._said[end][1]
            size += len(piece) if isinstance(piece, bytes) else 0
            end += 1
        taken, self._said = self._said[:end], self._said[end:]
        return taken
