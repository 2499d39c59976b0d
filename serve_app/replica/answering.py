"""A call's answer, made where its tokens are made: OpenAI's JSON or events, from an engine's chunks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol, TypeVar, cast

from serve_app.engine.protocol import Engine, GenerationChunk
from serve_app.openai.answers import Answer, Answering
from serve_app.openai.call import Call, Endpoint, Reply, error_reply
from serve_app.openai.errors import as_api_error, invalid
from serve_app.openai.requests import ChatRequest, CompletionRequest, GenerationFields, parse_request

T = TypeVar("T")
IndexedChunks = AsyncGenerator[list[tuple[int, GenerationChunk]], None]
"""(choice, a piece of it): those that are there at once."""

_KINDS: dict[Endpoint, type[GenerationFields]] = {"completions": CompletionRequest, "chat": ChatRequest}
_DONE = b"data: [DONE]\n\n"

logger = logging.getLogger("ray.serve")


class Answers(Protocol):
    """What a replica answers calls with: here for any engine, or an engine's own."""

    async def answer(self, call: Call) -> Reply:
        """When every choice has ended. An error is a reply like others."""

    def stream(self, call: Call) -> AsyncGenerator[Reply | bytes, None]:
        """Events, as many in a piece as are there at once, from when every choice has begun: until then an error still
        has its own HTTP status, and is the only element."""


class EngineAnswers:
    """Implements ``Answers`` with what any engine can do."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def answer(self, call: Call) -> Reply:
        try:
            answering, chunks = self._begin(call)
            async with aclosing(chunks):
                async for pieces in chunks:
                    for index, chunk in pieces:
                        answering.add(index, chunk)
            return Reply(200, answering.whole().model_dump_json(exclude_unset=True).encode())
        except Exception as error:
            return _refusal(error)

    async def stream(self, call: Call) -> AsyncGenerator[Reply | bytes, None]:
        try:
            answering, chunks = self._begin(call)
        except Exception as error:
            yield _refusal(error)
            return
        async with aclosing(chunks):
            begun: list[tuple[int, GenerationChunk]] = []
            waited_for = set(range(answering.num_choices))
            try:
                while waited_for:
                    pieces = await anext(chunks)
                    begun += pieces
                    waited_for -= {index for index, _ in pieces}
            except Exception as error:
                yield _refusal(error)
                return
            yield b"".join(map(_event, answering.opening())) + _said(answering, begun)
            try:
                async for pieces in chunks:
                    yield _said(answering, pieces)
            except Exception as error:
                # The status line is long gone. What follows an error event is nothing, not even [DONE].
                yield b"data: " + _refusal(error).body + b"\n\n"
                return
            yield b"".join(map(_event, answering.closing())) + _DONE

    def _begin(self, call: Call) -> tuple[Answering, IndexedChunks]:
        if call.endpoint not in _KINDS:
            told = f"POST /{call.endpoint} is answered by the vLLM engine alone (engine=vllm)"
            raise invalid(told, code="unsupported_value")
        request = parse_request(_KINDS[call.endpoint], call.body)
        sequences = [
            replace(sequence, revision=call.revision) for sequence in request.generations(call.answer_id, call.adapter)
        ]
        answering = Answering(
            id=call.answer_id,
            model=request.model,
            served=call.served,
            chat=call.endpoint == "chat",
            num_choices=len(sequences),
            include_usage=request.include_usage,
            continuous_usage=request.continuous_usage,
            choices_a_prompt=request.n,
        )
        return answering, merge([_as_generator(self._engine.generate(sequence)) for sequence in sequences])


def _said(answering: Answering, pieces: Sequence[tuple[int, GenerationChunk]]) -> bytes:
    events = []
    for index, chunk in pieces:
        answering.add(index, chunk)
        events.append(_event(answering.piece(index, chunk)))
    return b"".join(events)


def _event(piece: Answer) -> bytes:
    return b"data: " + piece.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def _refusal(error: Exception) -> Reply:
    told = as_api_error(error)
    if told.status == 500:
        logger.error("request failed", exc_info=error)
    return error_reply(told)


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[list[tuple[int, T]], None]:
    """The elements of all ``streams`` with their stream's index: at least one, and all that are there.

    The first error ends it, after what came before. However it ends, every stream has been closed when it has.
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
            came = [await queue.get()]
            while not queue.empty():
                came.append(queue.get_nowait())
            found: list[tuple[int, T]] = []
            failed: BaseException | None = None
            for item in came:
                if item is None:
                    num_open -= 1
                elif isinstance(item, BaseException):
                    failed = item
                    break
                else:
                    found.append(item)
            if found:
                yield found
            if failed is not None:
                raise failed
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _as_generator(chunks: AsyncIterator[GenerationChunk]) -> AsyncGenerator[GenerationChunk, None]:
    # The protocol promises aclose; an AsyncIterator's type does not.
    return cast("AsyncGenerator[GenerationChunk, None]", chunks)
