"""Every field of OpenAI's and vLLM's completions and chats, sent to both engines: the table of serve_app/README.md is
what they do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from serve_app.arguments import VllmArguments
from serve_app.engine.revisions import Revision
from serve_app.engine.transformers.engine import TransformersEngine
from serve_app.engine.transformers.settings import EngineSettings
from serve_app.engine.vllm.plugin import compatibility
from serve_app.openai.call import Call, Endpoint, Reply
from serve_app.openai.requests import NEUTRAL
from serve_app.replica.answering import Answers, EngineAnswers
from tests.support.conformance import CASES, FIELDS, IDS, PAGE, Asked, page_with_table
from tests.support.engines import DEVICE, Homes, serving_map
from tests.support.vllm_engine import Running, make_engine

needs_vllm = [pytest.mark.vllm, pytest.mark.skipif(compatibility.vllm_version() is None, reason="vLLM is not here")]


def test_the_table_is_what_is_tested() -> None:
    assert PAGE.read_text() == page_with_table(), "run: python -m tests.support.conformance"


def test_every_field_of_openais_is_in_the_table() -> None:
    own = {
        "chat": chat_create_params.CompletionCreateParamsBase.__annotations__,
        "completions": completion_create_params.CompletionCreateParamsBase.__annotations__,
    }
    assert [name for endpoint, names in own.items() for name in names if not is_there(name, endpoint)] == []


def is_there(name: str, endpoint: str) -> bool:
    return name == "model" or any(asked.name == name and endpoint in asked.endpoints for asked in FIELDS)


def test_every_field_that_is_accepted_where_it_asks_for_nothing_is_in_the_table() -> None:
    assert set(NEUTRAL) <= {asked.name for asked in FIELDS}


@pytest.fixture(scope="module")
def transformers(base_path: Path, zoo_path: Path) -> Iterator[Answers]:
    settings = EngineSettings(DEVICE, max_batch=2, max_model_len=256, num_threads=2)
    engine = TransformersEngine(base_path, Revision(0, serving_map(), (), Homes(zoo_path).load), settings)
    asyncio.run(engine.start())
    yield EngineAnswers(engine)
    asyncio.run(engine.stop())


@pytest.mark.parametrize(("asked", "endpoint"), CASES, ids=IDS)
def test_the_transformers_engine_does_what_the_table_says(
    transformers: Answers, asked: Asked, endpoint: Endpoint
) -> None:
    check(asyncio.run(answered(transformers, asked, endpoint)), asked, asked.transformers)


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_values_that_ask_for_nothing_are_accepted_all_together(transformers: Answers, endpoint: Endpoint) -> None:
    plain = Asked("temperature", 0, "honoured", "honoured").body(endpoint)
    for place in range(max(map(len, NEUTRAL.values())) + 1):
        nothing = {name: (*values, None)[min(place, len(values))] for name, values in NEUTRAL.items()}
        reply = asyncio.run(transformers.answer(call(plain | nothing, endpoint)))
        assert reply.status == 200, reply.body


@pytest.fixture(scope="module")
def vllm(base_path: Path, zoo_path: Path) -> Iterator[tuple[Running, Answers]]:
    from serve_app.replica.vllm_answers import VllmAnswers

    options = {"structured_outputs_backend": "xgrammar", "reasoning_parser": "granite"}
    running = Running(make_engine(base_path, Homes(zoo_path), **options))
    arguments = VllmArguments(tool_call_parser="hermes", enable_auto_tool_choice=True, reasoning_parser="granite")
    yield running, VllmAnswers(running.engine, arguments)
    running.close()


@pytest.mark.parametrize(
    ("asked", "endpoint"),
    [pytest.param(*case, marks=needs_vllm, id=name) for case, name in zip(CASES, IDS, strict=True)],
)
def test_the_vllm_engine_does_what_the_table_says(
    vllm: tuple[Running, Answers], asked: Asked, endpoint: Endpoint
) -> None:
    running, answers = vllm
    check(running.run(answered(answers, asked, endpoint)), asked, asked.vllm)


@pytest.mark.vllm
@pytest.mark.skipif(compatibility.vllm_version() is None, reason="vLLM is not here")
def test_every_field_of_vllms_is_in_the_table() -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    own = {"chat": ChatCompletionRequest.model_fields, "completions": CompletionRequest.model_fields}
    assert [name for endpoint, names in own.items() for name in names if not is_there(name, endpoint)] == []


def call(body: dict[str, Any], endpoint: Endpoint) -> Call:
    return Call(endpoint, json.dumps({"model": "the-base"} | body).encode(), "id-0", None, "sha256:0", 0)


async def answered(answers: Answers, asked: Asked, endpoint: Endpoint) -> Reply:
    body = asked.body(endpoint)
    if not body.get("stream"):
        return await answers.answer(call(body, endpoint))
    pieces = [piece async for piece in answers.stream(call(body, endpoint))]
    return cast(Reply, pieces[0]) if isinstance(pieces[0], Reply) else Reply(200, b"".join(pieces))  # type: ignore[arg-type]


def check(reply: Reply, asked: Asked, expected: str) -> None:
    assert reply.status == (400 if expected == "refused" else 200), reply.body
    if expected == "refused":
        error = json.loads(reply.body)["error"]
        assert error["param"] in (asked.name, *asked.beside) or asked.name in error["message"], error
