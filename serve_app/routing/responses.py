"""An answer on its way out: a replica's bytes as HTTP's."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from serve_app.openai.call import Reply, error_reply
from serve_app.openai.errors import as_api_error, retry_headers

Pieces = AsyncGenerator[Reply | bytes, None]
"""Events; or a Reply alone, where the request was refused."""

logger = logging.getLogger("ray.serve")


def as_json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


def as_response(reply: Reply, headers: Mapping[str, str]) -> Response:
    """``headers`` tell who answered: an error has none of them."""
    own = headers if reply.status == 200 else retry_headers(reply.status)
    return Response(reply.body, reply.status, own, media_type="application/json")


async def as_events(pieces: Pieces, headers: Mapping[str, str]) -> Response:
    """When the first piece is there; raises what comes instead of it."""
    try:
        first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    if isinstance(first, Reply):
        await pieces.aclose()
        return as_response(first, headers)
    return EventStream(_events(first, pieces), pieces, headers)


async def _events(first: bytes, pieces: Pieces) -> AsyncGenerator[bytes, None]:
    yield first
    try:
        async for piece in pieces:
            assert isinstance(piece, bytes)
            yield piece
    except Exception as error:
        # The status line is long gone. What follows an error event is nothing, not even [DONE].
        told = as_api_error(error)
        if told.status == 500:
            logger.exception("request failed in mid-stream")
        yield b"data: " + error_reply(told).body + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. Closes its generators however it ends: when the client goes away Starlette leaves
    them suspended, and the engine would go on until the garbage collector comes by."""

    def __init__(self, events: AsyncGenerator[bytes, None], pieces: Pieces, headers: Mapping[str, str]) -> None:
        own = {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=own)
        self._closing = (events, pieces)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._closing:
                await generator.aclose()
