"""Answers made by vLLM's own serving classes: the same as vLLM's own, for every adapter; and refusals by name."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from serve_app.arguments import VllmArguments
from serve_app.engine.vllm.plugin import compatibility
from serve_app.openai.call import Call, Endpoint, Reply
from tests.support.engines import CLUSTERS, GONE, PROMPTS, Homes, ask, collect
from tests.support.vllm_bodies import BODIES, CHAT, TOOL, events, same, told_by
from tests.support.vllm_engine import Running, make_engine

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(compatibility.vllm_version() is None, reason="vLLM is not here")]

SERVED = "sha256:0"


@pytest.fixture(scope="module")
def running(base_path: Path, zoo_path: Path) -> Iterator[Running]:
    running = Running(make_engine(base_path, Homes(zoo_path)))
    yield running
    running.close()


@pytest.fixture(scope="module")
def answers(running: Running) -> Any:
    return make_answers(running)


def make_answers(running: Running, **arguments: Any) -> Any:
    from serve_app.replica.vllm_answers import VllmAnswers

    return VllmAnswers(running.engine, VllmArguments(**arguments))


def call(body: dict[str, Any], adapter: str | None = None, **fields: Any) -> Call:
    endpoint: Endpoint = "chat" if "messages" in body else "completions"
    return called(endpoint, {"temperature": 0, "max_tokens": 8} | body | fields, adapter)


def called(endpoint: Endpoint, body: dict[str, Any], adapter: str | None = None) -> Call:
    document = {"model": adapter or "the-base"} | body
    return Call(endpoint, json.dumps(document).encode(), "cmpl-0123", adapter, SERVED, 0)


async def streamed(answers: Any, asked: Call) -> list[Any]:
    return [piece async for piece in answers.stream(asked)]


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


def test_the_prompt_is_no_part_of_the_answer_where_it_ends_in_no_whole_character(
    running: Running, answers: Any
) -> None:
    async def check() -> None:
        for prompt in ("The sign \ufffd", [504, 914, 10813]):
            asked: dict[str, Any] = {"prompt": prompt, "ignore_eos": True, "return_token_ids": True, "max_tokens": 12}
            [choice] = json.loads((await answers.answer(call(asked))).body)["choices"]
            tokens = json.dumps({"model": "the-base", "tokens": choice["token_ids"]}).encode()
            reply = await answers.answer(Call("detokenize", tokens, "detokenize-0", None, SERVED, 0))
            assert choice["text"] == json.loads(reply.body)["prompt"].rstrip("\ufffd")
            told = events(b"".join(await streamed(answers, call(asked, stream=True))).decode())
            assert "".join(chunk["choices"][0]["text"] for chunk in told) == choice["text"]

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


def test_an_answer_is_called_what_was_asked_for_though_an_adapter_of_another_name_makes_it(
    running: Running, answers: Any
) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": PROMPTS["roman"]}, {"messages": CHAT}]
    asked = [(body | {"model": f"alias-{n}"}, ("roman", "past")[n % 2]) for n in range(4) for body in bodies]

    async def check() -> None:
        # All at once: none gets the name of another that is being begun.
        replies = await asyncio.gather(*(answers.answer(call(*own)) for own in asked))
        pieces = await asyncio.gather(*(streamed(answers, call(*own, stream=True)) for own in asked))
        own = await asyncio.gather(*(answers.answer(call(body | {"model": name}, name)) for body, name in asked))
        for (body, _), reply, told, same_adapter in zip(asked, replies, pieces, own, strict=True):
            document = json.loads(reply.body)
            assert document["model"] == body["model"]
            assert document["choices"] == json.loads(same_adapter.body)["choices"]
            assert {chunk["model"] for chunk in events(b"".join(told).decode())} == {body["model"]}

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
    own = dataclasses.replace(running.engine.find("number-en"), chat_template=template)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running.engine, "find", lambda adapter_id, revision: own)
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


def test_a_tool_call_is_taken_apart_by_the_parser_that_is_named(running: Running) -> None:
    answers = make_answers(running, tool_call_parser="hermes", enable_auto_tool_choice=True)
    written = '<tool_call>\n{"name": "look", "arguments": {"name": "Ann"}}\n</tool_call>'
    forced = re.escape(written).replace("\\ ", " ").replace("\\\n", "\n")
    asked = {"messages": CHAT, "tools": [TOOL], "max_tokens": 60, "structured_outputs": {"regex": forced}}

    async def check() -> None:
        reply = await answers.answer(call(asked, tool_choice="auto"))
        [choice] = json.loads(reply.body)["choices"]
        [made] = choice["message"]["tool_calls"]
        assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("look", {"name": "Ann"})
        assert choice["finish_reason"] == "tool_calls"
        pieces = events(b"".join(await streamed(answers, call(asked, tool_choice="auto", stream=True))).decode())
        calls = [c for piece in pieces for c in piece["choices"][0]["delta"].get("tool_calls") or ()]
        assert calls[0]["function"]["name"] == "look"
        assert json.loads("".join(c["function"].get("arguments") or "" for c in calls)) == {"name": "Ann"}

        required = call({"messages": CHAT, "tools": [TOOL], "max_tokens": 60}, tool_choice="required")
        [choice] = json.loads((await answers.answer(required)).body)["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "look"

    running.run(check())


def test_without_a_parser_a_tool_choice_that_needs_one_is_a_400(running: Running, answers: Any) -> None:
    async def check() -> None:
        reply = await answers.answer(call({"messages": CHAT, "tools": [TOOL]}, tool_choice="auto"))
        assert reply.status == 400, reply.body

    running.run(check())


def test_reasoning_is_taken_apart_by_the_parser_that_is_named(running: Running) -> None:
    answers = make_answers(running, reasoning_parser="granite")
    written = "Here is my thought process: I see. Here is my response: Yes"
    asked = {"messages": CHAT, "structured_outputs": {"choice": [written]}, "max_tokens": 30}

    async def check() -> None:
        [choice] = json.loads((await answers.answer(call(asked))).body)["choices"]
        assert choice["message"]["reasoning"].strip() == "I see."
        assert choice["message"]["content"].strip() == "Yes"

    running.run(check())


def test_a_template_of_the_arguments_is_the_bases_and_no_adapters_own(running: Running) -> None:
    answers = make_answers(running, chat_template="{% for m in messages %}say {{ m.content }}{% endfor %}")

    async def tokens(adapter: str | None) -> Any:
        reply = await answers.answer(called("tokenize", {"messages": CHAT, "return_token_strs": True}, adapter))
        assert reply.status == 200, reply.body
        return json.loads(reply.body)

    async def check() -> None:
        told = await tokens(None)
        words = await answers.answer(called("detokenize", {"tokens": told["tokens"]}))
        assert json.loads(words.body) == {"prompt": "say Say three words."}
        assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
        reply = await answers.answer(call({"messages": CHAT}))
        assert json.loads(reply.body)["usage"]["prompt_tokens"] == told["count"]
        assert (await tokens("past"))["tokens"] == told["tokens"]
        own = dataclasses.replace(running.engine.find("past"), chat_template="{{ messages[0].content }}")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(running.engine, "find", lambda adapter_id, revision: own)
            assert (await tokens("past"))["count"] == told["count"] - 1

    running.run(check())


@pytest.mark.parametrize(
    "arguments",
    [
        {"tool_call_parser": "nobodys", "enable_auto_tool_choice": True},
        {"reasoning_parser": "nobodys"},
        {"chat_template": "/no/such/file.jinja"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_vllm_does_not_take_are_named(running: Running, arguments: dict[str, Any]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ConfigError, match=f"vllm.{name} '{re.escape(value)}'"):
        make_answers(running, **arguments)


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "x", "frob": 1}, "frob"),
        ("tokenize", {"prompt": ["x"]}, "prompt"),
        ("tokenize", {"messages": CHAT, "chat_template": "x"}, "chat_template"),
        ("detokenize", {"tokens": [10**9]}, "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens"),
        ("detokenize", {"prompt": "x", "tokens": [5]}, "prompt"),
    ],
)
def test_what_cannot_be_tokenized_is_a_400(
    running: Running, answers: Any, endpoint: Endpoint, body: dict[str, Any], param: str
) -> None:
    async def check() -> None:
        reply = await answers.answer(called(endpoint, body))
        assert (reply.status, json.loads(reply.body)["error"]["param"]) == (400, param), reply.body

    running.run(check())
