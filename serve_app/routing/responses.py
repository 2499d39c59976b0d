"""An answer on its way out: chunks of the engine in, JSON or server-sent events of the OpenAI API out."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from serve_app.engine.protocol import GenerationChunk
from serve_app.openai.answers import Answer, Answering
from serve_app.openai.errors import as_api_error

IndexedChunks = AsyncGenerator[tuple[int, GenerationChunk], None]
"""(choice, a piece of it)."""

logger = logging.getLogger("ray.serve")


def as_json(body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json", headers=headers)


async def whole(chunks: IndexedChunks, answering: Answering, headers: Mapping[str, str]) -> Response:
    """Answers when every choice has ended; raises what an engine raises."""
    async with aclosing(chunks):
        async for index, chunk in chunks:
            answering.add(index, chunk)
    return as_json(answering.whole(), headers)


async def stream(chunks: IndexedChunks, answering: Answering, headers: Mapping[str, str]) -> Response:
    """Answers when every choice has begun: until then an error still has its own HTTP status, and is raised."""
    begun: list[tuple[int, GenerationChunk]] = []
    try:
        while len({index for index, _ in begun}) < answering.num_choices:
            begun.append(await anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(_events(begun, chunks, answering), chunks, headers)


async def _events(
    begun: Sequence[tuple[int, GenerationChunk]], chunks: IndexedChunks, answering: Answering
) -> AsyncGenerator[str, None]:
    for opening in answering.opening():
        yield _event(opening)
    try:
        for index, chunk in begun:
            answering.add(index, chunk)
            yield _event(answering.piece(index, chunk))
        async for index, chunk in chunks:
            answering.add(index, chunk)
            yield _event(answering.piece(index, chunk))
    except Exception as error:
        # The status line is long gone. What follows an error event is nothing, not even [DONE].
        answer = as_api_error(error)
        if answer.status == 500:
            logger.exception("request failed in mid-stream")
        yield f"data: {json.dumps(answer.body)}\n\n"
        return
    for closing in answering.closing():
        yield _event(closing)
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. Closes its generators however it ends: when the client goes away Starlette leaves
    them suspended, and the engine would go on until the garbage collector comes by."""

    def __init__(self, events: AsyncGenerator[str, None], chunks: IndexedChunks, headers: Mapping[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})
        self._closing = (events, chunks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._closing:
                await generator.aclose()


def _event(answer: Answer) -> str:
    return f"data: {answer.model_dump_json(exclude_unset=True)}\n\n"
