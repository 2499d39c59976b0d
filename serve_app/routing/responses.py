"""An answer on its way out: a replica's bytes as HTTP's."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from serve_app.openai.call import Reply, error_reply
from serve_app.openai.errors import RETRY_AFTER_S, as_api_error

Pieces = AsyncGenerator[Reply | bytes, None]
"""Events; or a Reply alone, where the request was refused."""

_COMMENT = b": waiting for the first token\n\n"

logger = logging.getLogger("ray.serve")


def as_json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


def as_response(reply: Reply, headers: Mapping[str, str]) -> Response:
    """``headers`` tell who answered: an error has none of them."""
    retry = {"Retry-After": str(RETRY_AFTER_S)} if reply.status == 503 else {}
    own = headers if reply.status == 200 else retry
    return Response(reply.body, reply.status, own, media_type="application/json")


async def as_events(pieces: Pieces, headers: Mapping[str, str], keep_alive_s: float) -> Response:
    """When the first piece is there, and raises what comes instead of it; or after ``keep_alive_s``, with comments from
    then on until it is there. What a request is refused for is known before it waits for its turn."""
    first = asyncio.ensure_future(_first(pieces))
    try:
        await asyncio.wait({first}, timeout=keep_alive_s)
        if first.done() and isinstance(refusal := first.result(), Reply):
            await pieces.aclose()
            return as_response(refusal, headers)
    except BaseException:
        await _close(first, pieces)
        raise
    return EventStream(_events(first, pieces, keep_alive_s), first, pieces, headers)


async def _first(pieces: Pieces) -> Reply | bytes:
    return await anext(pieces)


async def _close(first: asyncio.Future[Reply | bytes], pieces: Pieces) -> None:
    # A generator that is being waited for cannot be closed.
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await pieces.aclose()


async def _events(
    first: asyncio.Future[Reply | bytes], pieces: Pieces, keep_alive_s: float
) -> AsyncGenerator[bytes, None]:
    try:
        while not first.done():
            yield _COMMENT
            await asyncio.wait({first}, timeout=keep_alive_s)
        begun = first.result()
        # The status line is long gone. What follows an error event is nothing, not even [DONE].
        yield begun if isinstance(begun, bytes) else _error_event(begun)
        async for piece in pieces:
            yield piece if isinstance(piece, bytes) else _error_event(piece)
    except Exception as error:
        told = as_api_error(error)
        if told.status == 500:
            logger.exception("request failed in mid-stream")
        yield _error_event(error_reply(told))


def _error_event(reply: Reply) -> bytes:
    return b"data: " + reply.body + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. Closes its generators however it ends: when the client goes away Starlette leaves
    them suspended, and the engine would go on until the garbage collector comes by."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        first: asyncio.Future[Reply | bytes],
        pieces: Pieces,
        headers: Mapping[str, str],
    ) -> None:
        # nginx would collect a stream before it passes it on.
        own = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=own)
        self._own, self._first, self._pieces = events, first, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._own.aclose()
            await _close(self._first, self._pieces)
