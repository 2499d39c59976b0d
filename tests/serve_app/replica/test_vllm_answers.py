"""Answers made by vLLM's own serving classes: the same as vLLM's own, for every adapter; and refusals by name."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.engine.vllm.plugin import compatibility
from serve_app.openai.call import Call, Endpoint, Reply
from tests.support.engines import CLUSTERS, GONE, PROMPTS, Homes, ask, collect
from tests.support.vllm_engine import Running, make_engine

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(compatibility.vllm_version() is None, reason="vLLM is not here")]

SERVED = "sha256:0"
CHAT = [{"role": "user", "content": "Say three words."}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
# Of the base, greedy where nothing else is said.
BODIES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "The capital of France is"},
    "two prompts": {"prompt": ["One, two,", "Once upon a time"]},
    "tokens": {"prompt": [504, 3575, 282]},
    "lists of tokens": {"prompt": [[504, 3575], [504, 3575, 282]]},
    "echo": {"prompt": "The capital", "echo": True},
    "echo alone": {"prompt": "The capital", "echo": True, "max_tokens": 0},
    "logprobs": {"prompt": "The capital of France is", "logprobs": 3},
    "echo and logprobs": {"prompt": "The capital of", "echo": True, "logprobs": 2},
    "n": {"prompt": "Once", "n": 3, "temperature": 1.0, "seed": 7},
    "seed": {"prompt": "Once", "temperature": 1.0, "seed": 8, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
    "penalties": {"prompt": "a a a a", "frequency_penalty": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    "bias": {"prompt": "1, 2, 3,", "logit_bias": {"33": -100, "260": 4}},
    "stop": {"prompt": "1, 2, 3, 4,", "stop": ["6", "never", "nor", "this"]},
    "stop in output": {"prompt": "1, 2, 3, 4,", "stop": ["6"], "include_stop_str_in_output": True},
    "stop tokens": {"prompt": "1, 2, 3, 4,", "stop_token_ids": [38]},
    "least and most": {"prompt": "Hello", "min_tokens": 5, "max_tokens": 5, "ignore_eos": True},
    "bad words": {"prompt": "The capital of France is", "bad_words": [" Paris"]},
    "allowed tokens": {"prompt": "The capital of France is", "allowed_token_ids": [260, 253, 33]},
    "token ids": {"prompt": "The capital", "return_token_ids": True},
    "tokens as ids": {"prompt": "The capital", "logprobs": 1, "return_tokens_as_token_ids": True},
    "special tokens": {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "skip_special_tokens": False},
    "truncated": {"prompt": "one two three four five six", "truncate_prompt_tokens": 3},
    "regex": {"prompt": "The year", "structured_outputs": {"regex": " [0-9]{4}"}},
    "choice": {"prompt": "Yes or no?", "structured_outputs": {"choice": ["yes", "no"]}},
    "chat": {"messages": CHAT},
    "chat with system": {"messages": [{"role": "system", "content": "Be short."}, *CHAT]},
    "chat in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Say"}]}]},
    "chat as developer": {"messages": [{"role": "developer", "content": "Be short."}, *CHAT]},
    "chat with logprobs": {"messages": CHAT, "logprobs": True, "top_logprobs": 2},
    "chat n": {"messages": CHAT, "n": 2, "temperature": 0.8, "seed": 3},
    "chat limit": {"messages": CHAT, "max_completion_tokens": 3, "max_tokens": None},
    "chat stop": {"messages": CHAT, "stop": "e"},
    "chat object": {"messages": CHAT, "response_format": {"type": "json_object"}},
    "chat schema": {
        "messages": CHAT,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        "max_tokens": 24,
    },
    "chat prefill": {
        "messages": [*CHAT, {"role": "assistant", "content": "One two"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "chat template's own": {"messages": CHAT, "chat_template_kwargs": {"some": "thing"}},
    "chat with tools unused": {"messages": CHAT, "tools": [TOOL], "tool_choice": "none"},
    "chat played back": {
        "messages": [
            *CHAT,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "1", "content": "a, b, c"},
        ]
    },
    "usage all along": {"messages": CHAT, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
}


@pytest.fixture(scope="module")
def running(base_path: Path, zoo_path: Path) -> Iterator[Running]:
    running = Running(make_engine(base_path, Homes(zoo_path)))
    yield running
    running.close()


@pytest.fixture(scope="module")
def answers(running: Running) -> Any:
    from serve_app.replica.vllm_answers import VllmAnswers

    return VllmAnswers(running.engine)


def call(body: dict[str, Any], adapter: str | None = None, **fields: Any) -> Call:
    endpoint: Endpoint = "chat" if "messages" in body else "completions"
    document = {"model": adapter or "the-base", "temperature": 0, "max_tokens": 8} | body | fields
    return Call(endpoint, json.dumps(document).encode(), "cmpl-0123", adapter, SERVED)


async def streamed(answers: Any, asked: Call) -> list[Any]:
    return [piece async for piece in answers.stream(asked)]


def events(text: str) -> list[Any]:
    lines = text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def same(document: Any) -> Any:
    """But for ids and times, and what names who answered."""
    if isinstance(document, list):
        return [same(item) for item in document]
    if not isinstance(document, dict):
        return document
    return {k: same(v) for k, v in document.items() if k not in ("id", "created", "system_fingerprint")}


def told_by(chunks: list[Any]) -> Any:
    """A stream's choices, each put together again: how much of them is in one chunk depends on who had to wait."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            own = choices.setdefault(choice["index"], {})
            for field, value in (choice | choice.get("delta", {})).items():
                if field == "logprobs" and value is not None:
                    for part, entries in value.items():
                        own.setdefault(f"logprobs.{part}", []).extend(entries or [])
                elif field in ("text", "content", "token_ids") and value is not None:
                    own[field] = (own.get(field) or type(value)()) + value
                elif field != "delta":
                    own[field] = value if value is not None else own.get(field)
    usage = [chunk.get("usage") for chunk in chunks if chunk.get("usage")]
    return choices, usage[-1:], {field: same(chunks[0][field]) for field in ("object", "model")}


@pytest.mark.parametrize("name", BODIES)
def test_the_bases_answer_is_that_of_vllms_own_server_whole_and_streamed(
    running: Running, answers: Any, name: str
) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.online_renderer import OnlineRenderer

    async def vllms_own(asked: Call) -> Any:
        llm = running.engine.llm
        models = OpenAIServingModels(llm, [BaseModelPath("the-base", "the-base")])
        own: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
        }
        renderer = OnlineRenderer(llm.model_config, llm.renderer, **own)
        if asked.endpoint == "chat":
            chat = OpenAIServingChat(llm, models, "assistant", online_renderer=renderer, **own)
            return await chat.create_chat_completion(ChatCompletionRequest.model_validate_json(asked.body))
        completion = OpenAIServingCompletion(llm, models, online_renderer=renderer, request_logger=None)
        return await completion.create_completion(CompletionRequest.model_validate_json(asked.body))

    async def check() -> None:
        body = {field: value for field, value in BODIES[name].items() if field != "stream_options"}
        reply = await answers.answer(call(body))
        assert reply.status == 200, reply.body
        # vLLM's template knows no developer; here that is the system.
        theirs = json.loads(json.dumps(body).replace('"developer"', '"system"'))
        assert same(json.loads(reply.body)) == same(json.loads((await vllms_own(call(theirs))).model_dump_json()))
        assert json.loads(reply.body)["system_fingerprint"] == SERVED

        options = {"stream": True, "stream_options": BODIES[name].get("stream_options", {"include_usage": True})}
        told = events(b"".join(await streamed(answers, call(body, **options))).decode())
        expected = events("".join([piece async for piece in await vllms_own(call(theirs, **options))]))
        assert told_by(told) == told_by(expected)
        if "stream_options" in BODIES[name]:
            assert all(chunk["usage"]["prompt_tokens"] > 0 for chunk in told)
        assert not any(chunk.get("system_fingerprint") for chunk in told)

    running.run(check())


def test_what_vllm_does_not_stream_is_whole_and_more_stops_than_it_takes_all_end_the_answer(
    running: Running, answers: Any
) -> None:
    async def check() -> None:
        told = call({"prompt": "The capital of", "prompt_logprobs": 1})
        assert len(json.loads((await answers.answer(told)).body)["choices"][0]["prompt_logprobs"]) == 3
        [refused] = await streamed(answers, call({"prompt": "x", "prompt_logprobs": 1}, stream=True))
        assert (refused.status, json.loads(refused.body)["error"]["param"]) == (400, "prompt_logprobs")
        stops = ["never", "nor", "this", "that", "6"]
        reply = await answers.answer(call({"prompt": "1, 2, 3, 4,", "stop": stops, "max_tokens": 30}))
        [choice] = json.loads(reply.body)["choices"]
        assert (choice["text"], choice["stop_reason"]) == (" 5, ", "6")
        # A special token, which no text has.
        endless = {"messages": CHAT, "ignore_eos": True, "max_tokens": 60}
        ended, stopped = [
            json.loads((await answers.answer(call(endless | more))).body)["choices"][0]
            for more in ({"ignore_eos": False}, {"stop": "<|im_end|>"})
        ]
        assert stopped["message"]["content"] == ended["message"]["content"]
        assert stopped["finish_reason"] == ended["finish_reason"] == "stop"

    running.run(check())


def test_every_adapter_answers_with_its_own_weights_and_under_its_own_name(running: Running, answers: Any) -> None:
    names = [name for home in CLUSTERS.values() for name in home] + ["past", "first-letter", "date-us", None]

    async def check() -> None:
        expected = [(await collect(running.engine, ask(name))).text for name in names]  # type: ignore[arg-type]
        bodies = [call({"prompt": PROMPTS[name], "max_tokens": 24}, name) for name in names]
        replies = await asyncio.gather(*(answers.answer(body) for body in bodies))
        documents = [json.loads(reply.body) for reply in replies]
        assert [document["choices"][0]["text"] for document in documents] == expected
        assert [document["model"] for document in documents] == [name or "the-base" for name in names]
        assert len(set(expected)) == len(expected)

    running.run(check())


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x", "frob": 1}, "frob", "unknown_field"),
        ({"prompt": "x", "guided_regex": "a"}, "guided_regex", "unknown_field"),
        ({"prompt": "x", "chat_template": "{{ x }}"}, "chat_template", "unsupported_value"),
        ({"messages": CHAT, "chat_template": "{{ x }}"}, "chat_template", "unsupported_value"),
        ({"prompt": "x", "cache_salt": "mine"}, "cache_salt", "unsupported_value"),
        ({"prompt": "x", "temperature": "hot"}, "temperature", "invalid_value"),
        ({"prompt": "x", "temperature": -1}, "temperature", None),
        ({"prompt": "x", "n": 0}, None, None),
        ({"prompt": "x", "n": 2}, None, None),
        ({"prompt": "x", "top_p": 2}, None, None),
        ({"prompt": "x", "max_tokens": 4096}, None, "context_length_exceeded"),
        ({"prompt": "word " * 2000}, "prompt", "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages", "context_length_exceeded"),
        ({"prompt": [10**6]}, None, None),
        ({"prompt": []}, "prompt", None),
        ({"prompt": ""}, None, None),
        ({}, "prompt", "missing_field"),
        ({"messages": []}, "messages", None),
        ({"prompt": "x", "stop": [3]}, "stop", "invalid_value"),
        ({"prompt": "x", "stop": "a<|im_end|>"}, "stop", None),
        ({"prompt": "x", "user": 3}, "user", "invalid_value"),
        ({"prompt": "x", "n": "64"}, "n", "invalid_value"),
        ({"prompt": "x", "n": 64.0}, "n", "invalid_value"),
        ({"prompt": "x", "best_of": 2}, "best_of", "invalid_value"),
        ({"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens", None),
        ({"prompt": "x", "top_k": 10**30}, "top_k", "invalid_value"),
        ({"prompt": "x", "logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias", "invalid_value"),
        ({"prompt": "x", "allowed_token_ids": list(range(1025))}, "allowed_token_ids", "invalid_value"),
        ({"prompt": "x", "stop_token_ids": list(range(65)), "min_tokens": 1}, "stop_token_ids", "invalid_value"),
        ({"prompt": "x", "bad_words": ["a b " * 300]}, "bad_words", "invalid_value"),
        ({"prompt": "x", "structured_outputs": "x"}, None, None),
        ({"prompt": [[5, 49152]]}, "prompt", "invalid_value"),
        ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs", None),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", None),
        ({"messages": CHAT, "tools": [{}], "tool_choice": {"type": "function", "function": {"name": "a"}}}, None, None),
        ({"messages": ["x"]}, None, None),
        ({"messages": CHAT, "tools": [TOOL], "tool_choice": "required"}, None, None),
        ({"prompt": "x", "structured_outputs": {"regex": "("}}, None, None),
        ({"prompt": "x", "logit_bias": {"1000000": 1}}, None, None),
        ({"prompt": "x", "stop_token_ids": ["a"]}, "stop_token_ids", None),
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_what_a_client_does_wrong_is_a_400_of_openais_shape(
    running: Running, answers: Any, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    async def check() -> None:
        for reply in (await answers.answer(call(body)), *(await streamed(answers, call(body, stream=True)))):
            assert isinstance(reply, Reply), reply
            assert reply.status == 400, reply.body
            error = json.loads(reply.body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert param is None or error["param"].startswith(param)
            assert code is None or error["code"] == code

    running.run(check())
    assert running.engine.health().alive


def test_what_says_only_almost_whether_to_stream_is_a_400(running: Running, answers: Any) -> None:
    for almost in (1, "true", "no"):
        reply = running.run(answers.answer(call({"prompt": "x"}, stream=almost)))
        assert (reply.status, json.loads(reply.body)["error"]["param"]) == (400, "stream")


def test_an_adapter_that_failed_is_a_503_with_its_reason(running: Running, answers: Any) -> None:
    reply = running.run(answers.answer(call({"prompt": "x"}, "gone")))
    assert reply.status == 503
    assert GONE in json.loads(reply.body)["error"]["message"]


def test_a_chat_goes_through_the_template_that_its_adapter_brought(running: Running, answers: Any) -> None:
    template = "{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}"
    asked = call(
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "450 in English words?"}]}]}, "number-en"
    )
    plain = call({"prompt": "Q: 450 in English words?\nA:"}, "number-en")
    adapters = running.engine.serving_map.adapters
    own = dataclasses.replace(adapters["number-en"], chat_template=template)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            answers, "_map", dataclasses.replace(answers._map, adapters=dict(adapters) | {"number-en": own})
        )
        said = json.loads(running.run(answers.answer(asked)).body)
        expected = json.loads(running.run(answers.answer(plain)).body)
        for more in ({"tools": [TOOL], "tool_choice": "none"}, {"chat_template_kwargs": {"a": 1}}):
            refused = running.run(answers.answer(call({"messages": CHAT} | more, "number-en")))
            assert (refused.status, json.loads(refused.body)["error"]["param"]) == (400, next(iter(more)))
        for wrong in ([{}] * 20_000, ["x"]):
            assert running.run(answers.answer(call({"messages": wrong}, "number-en"))).status == 400
        # And the template still speaks.
        assert running.run(answers.answer(asked)).status == 200
    assert said["choices"][0]["message"]["content"] == expected["choices"][0]["text"]
    assert said["usage"] == expected["usage"]


def test_a_client_that_leaves_lets_its_home_go(running: Running, answers: Any) -> None:
    async def check() -> None:
        stream = answers.stream(call({"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}, "roman"))
        await anext(stream)
        assert running.engine.health().num_running == 1
        await stream.aclose()
        assert running.engine.health().num_running == 0

    running.run(check())
