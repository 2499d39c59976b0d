"""Answers from an engine's chunks: whole, or as events, of which as many travel together as are there at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest

from cluster.errors import EngineStopped, RequestError
from serve_app.engine.protocol import Engine, GenerationChunk, GenerationRequest
from serve_app.openai.call import Call, Endpoint, Reply
from serve_app.replica.answering import EngineAnswers


class Script:
    """An engine that says "a0 a1 ..." to each sequence, a chunk at a time, or raises an error instead of a chunk."""

    def __init__(self, num_chunks: int = 3, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.num_chunks, self.fails_at, self.error = num_chunks, fails_at, error
        self.num_open = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        self.num_open += 1
        try:
            for step in range(self.num_chunks):
                if step == self.fails_at and self.error is not None:
                    raise self.error
                end = "stop" if step == self.num_chunks - 1 else None
                yield GenerationChunk(f"a{step} ", (step,), 5, step + 1, end)
                await asyncio.sleep(0)
        finally:
            self.num_open -= 1


def call(endpoint: Endpoint = "completions", **fields: Any) -> Call:
    own = {"prompt": "x"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    return Call(endpoint, json.dumps({"model": "m"} | own | fields).encode(), "id", "m", "sha256:0", 0)


def whole(script: Script, asked: Call) -> Reply:
    return asyncio.run(EngineAnswers(cast(Engine, script)).answer(asked))


def pieces(script: Script, asked: Call) -> list[Any]:
    async def collect() -> list[Any]:
        return [piece async for piece in EngineAnswers(cast(Engine, script)).stream(asked)]

    return asyncio.run(collect())


def events(said: list[Any]) -> list[Any]:
    lines = b"".join(said).decode().split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) if line != "data: [DONE]" else line for line in lines]


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_stream_says_what_the_whole_answer_says(endpoint: Endpoint) -> None:
    asked = call(endpoint, n=2, temperature=1, stream=True, stream_options={"include_usage": True})
    reply = whole(Script(), call(endpoint, n=2, temperature=1))
    assert reply.status == 200
    expected = json.loads(reply.body)
    *chunks, usage, done = events(pieces(Script(), asked))
    texts = ["", ""]
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "") if endpoint == "chat" else choice["text"]
    told = [c["message"]["content"] if endpoint == "chat" else c["text"] for c in expected["choices"]]
    assert texts == told == ["a0 a1 a2 "] * 2
    assert (usage["choices"], usage["usage"]) == ([], expected["usage"])
    assert done == "data: [DONE]"


def test_what_is_there_at_once_travels_together() -> None:
    said = pieces(Script(), call(n=8, temperature=1, stream=True))
    assert len(events(said)) == 8 * 3 + 1
    assert len(said) <= 3 + 1, "a message for each step, and the end"


def test_what_is_refused_before_the_first_token_is_one_reply_with_its_status() -> None:
    error = RequestError("too long", "prompt")
    for script, asked, param in [
        (Script(fails_at=0, error=error), call(stream=True), "prompt"),
        (Script(), call(stream=True, frob=1), "frob"),
    ]:
        [refused] = pieces(script, asked)
        for reply in (refused, whole(script, asked)):
            assert isinstance(reply, Reply)
            assert reply.status == 400
            assert json.loads(reply.body)["error"]["param"] == param
        assert script.num_open == 0


def test_an_error_in_mid_stream_is_an_event_after_which_nothing_comes_and_every_sequence_has_ended() -> None:
    script = Script(fails_at=1, error=EngineStopped("the engine died"))
    said = events(pieces(script, call(n=2, temperature=1, stream=True)))
    assert [set(event) for event in said[-1:]] == [{"error"}]
    assert said[-1]["error"]["message"] == "the engine died"
    assert all("choices" in event for event in said[:-1])
    assert script.num_open == 0


def test_a_bug_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    reply = whole(Script(fails_at=1, error=RuntimeError("a secret path")), call())
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert "a secret path" in caplog.text
