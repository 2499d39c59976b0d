"""Requests in OpenAI's form: honoured, accepted at a neutral value, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.errors import EngineStopped, HomeUnavailable, RequestError, UnknownAdapter
from serve_app.engine.protocol import GenerationChunk, GenerationRequest, TokenLogprobs
from serve_app.openai.answers import Answering, page
from serve_app.openai.errors import ApiError, as_api_error
from serve_app.openai.requests import NEUTRAL, ChatRequest, CompletionRequest, GenerationFields, parse_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps(CHAT | fields).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps(COMPLETION | fields).encode())


def test_every_honoured_field_reaches_the_engine() -> None:
    request = chat(
        max_tokens=5, min_tokens=2, ignore_eos=True, temperature=0.5, top_p=0.9, stop=["a", "b"], seed=-7, stream=True,
        top_k=7, min_p=0.1, presence_penalty=-1, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias={"5": -100},
        stop_token_ids=[3, 4], n=2,
    )  # fmt: skip
    assert request.generations("id", "m") == [
        GenerationRequest(
            f"id-{choice}",
            "m",
            messages=({"role": "user", "content": "hi"},),
            max_tokens=5,
            min_tokens=2,
            ignore_eos=True,
            temperature=0.5,
            top_p=0.9,
            top_k=7,
            min_p=0.1,
            presence_penalty=-1.0,
            frequency_penalty=0.5,
            repetition_penalty=1.2,
            logit_bias=((5, -100.0),),
            stop_token_ids=(3, 4),
            stop=("a", "b"),
            seed=choice - 7,
        )
        for choice in range(2)
    ]


def test_n_choices_of_each_prompt_come_one_after_the_other_each_with_a_seed_of_its_own() -> None:
    requests = completion(prompt=["a", "b"], n=2, seed=2**63 - 1).generations("id", None)
    last, first = 2**63 - 1, -(2**63)
    assert [(r.request_id, r.prompt, r.seed) for r in requests] == [
        ("id-0", "a", last),
        ("id-1", "a", first),
        ("id-2", "b", last),
        ("id-3", "b", first),
    ]
    assert completion(n=2, best_of=2).n == 2


def test_defaults_are_openais() -> None:
    [of_chat], [of_completion] = chat().generations("id", None), completion().generations("id", None)
    assert (of_chat.max_tokens, of_chat.temperature, of_chat.top_p, of_chat.seed) == (None, 1.0, 1.0, None)
    assert of_completion.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2], [(None, (1, 2))]),
        ([[1, 2], [3]], [(None, (1, 2)), (None, (3,))]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: Any, expected: list[Any]) -> None:
    requests = completion(prompt=prompt).generations("id", None)
    assert [(r.prompt, r.prompt_token_ids) for r in requests] == expected
    assert [r.request_id for r in requests] == [f"id-{i}" for i in range(len(expected))]


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], 2], [-1], [True], [1.5], 3, None, {"a": 1}, [["a"]]])
def test_a_prompt_of_any_other_form_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_text_parts_are_joined_and_echoed_nulls_of_a_message_accepted() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": parts},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "d"},
    ]
    [request] = chat(messages=messages).generations("id", None)
    assert request.messages is not None
    assert [m["content"] for m in request.messages] == ["a\nb", "c", "d"]


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_a_field_that_is_not_done_is_accepted_at_its_neutral_values_and_refused_at_others(name: str) -> None:
    expected = chat()
    for neutral in (None, *NEUTRAL[name]):
        assert chat(**{name: neutral}) == expected
    with pytest.raises(ApiError) as caught:
        chat(**{name: "something else"})
    assert (caught.value.status, caught.value.param) == (400, name)
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frobnicate": 1}, "frobnicate"),
        ({"frobnicate": None}, "frobnicate"),
        ({"n": 0}, "n"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 2, "best_of": 3}, "best_of"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "nothing"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "min_tokens": 2, "max_tokens": 4}, "min_tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"user": 3}, "user"),
        ({"metadata": "x"}, "metadata"),
        ({"store": "yes"}, "store"),
        ({"model": None}, "model"),
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages[0].name"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "reasoning_content": "hm"}]}, "messages[0].reasoning_content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"stop": "x" * 4097}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message


@pytest.mark.parametrize(
    "field",
    [
        {"user": "someone"},
        {"safety_identifier": "abc"},
        {"prompt_cache_key": "abc"},
        {"prompt_cache_retention": "24h"},
        {"service_tier": "flex"},
        {"metadata": {"run": "7"}},
        {"store": True},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_field_of_which_no_text_could_follow_is_accepted_whatever_it_says(field: dict[str, Any]) -> None:
    assert chat(**field) == chat(**dict.fromkeys(field)) == chat()
    assert completion(**field) == completion()


def test_a_conversation_as_agents_play_it_back_is_taken_as_it_was_said() -> None:
    part = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "developer", "content": "a"},
        {"role": "user", "content": [part], "name": "bob"},
        {"role": "assistant", "content": None, "tool_calls": [], "reasoning_content": None, "annotations": []},
        {"role": "assistant", "content": "c", "refusal": None, "audio": None, "function_call": None, "reasoning": ""},
        {"role": "user", "content": "d"},
    ]
    [request] = chat(messages=messages).generations("id", None)
    said = [("system", "a"), ("user", "b"), ("assistant", ""), ("assistant", "c"), ("user", "d")]
    assert request.messages == tuple({"role": role, "content": content} for role, content in said)


def test_an_image_in_a_message_is_refused_at_its_place() -> None:
    with pytest.raises(ApiError) as caught:
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    assert caught.value.param is not None
    assert caught.value.param.startswith("messages[0].content")


def test_equal_token_limits_are_one_limit() -> None:
    assert chat(max_tokens=4, max_completion_tokens=4).max_new_tokens == 4
    assert completion(max_tokens=4, max_completion_tokens=4).max_new_tokens == 4
    assert completion(max_completion_tokens=3).max_new_tokens == 3


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'"x"', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_request(ChatRequest, body)
    assert caught.value.status == 400
    assert set(caught.value.body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RequestError("too long", "prompt"), 400, None),
        (UnknownAdapter("no such"), 404, "model_not_found"),
        (HomeUnavailable("broken"), 503, "service_unavailable"),
        (EngineStopped("dead"), 503, "service_unavailable"),
        (RuntimeError("a secret path"), 500, "internal"),
    ],
)
def test_every_error_has_its_status_and_a_bug_tells_nothing(error: Exception, status: int, code: str | None) -> None:
    answer = as_api_error(error)
    assert (answer.status, answer.code) == (status, code)
    assert "secret" not in json.dumps(answer.body)


def test_usage_is_summed_over_prompts_and_choices_keep_their_index() -> None:
    answering = Answering("id", "m", "rev", chat=False, num_choices=2, include_usage=False)
    answering.add(1, GenerationChunk("x", (1,), 5, 1))
    answering.add(0, GenerationChunk("a", (1,), 3, 1, "length"))
    answering.add(1, GenerationChunk("y", (2,), 5, 2, "stop"))
    whole = answering.whole().model_dump(exclude_unset=True)
    assert whole["usage"] == {"prompt_tokens": 8, "completion_tokens": 3, "total_tokens": 11}
    answering.choices_a_prompt = 2  # both of one prompt
    assert answering.usage().prompt_tokens == 5
    assert [(c["index"], c["text"], c["finish_reason"]) for c in whole["choices"]] == [
        (0, "a", "length"),
        (1, "xy", "stop"),
    ]


def test_usage_is_null_in_the_chunks_of_a_stream_that_asked_for_it_and_absent_in_others() -> None:
    chunk = GenerationChunk("x", (1,), 5, 1)
    asked, not_asked = (Answering("id", "m", "rev", True, 1, include_usage=asked) for asked in (True, False))
    assert json.loads(asked.piece(0, chunk).model_dump_json(exclude_unset=True))["usage"] is None
    assert "usage" not in json.loads(not_asked.piece(0, chunk).model_dump_json(exclude_unset=True))


def test_usage_is_in_every_chunk_where_it_is_asked_for_all_along() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    request = chat(stream=True, stream_options=options)
    assert (request.include_usage, request.continuous_usage) == (True, True)
    alone = chat(stream=True, stream_options={"continuous_usage_stats": True})
    assert (alone.include_usage, alone.continuous_usage) == (False, False)
    answering = Answering("id", "m", "rev", True, 1, include_usage=True, continuous_usage=True)
    counted = []
    for chunk in (GenerationChunk("x", (1,), 5, 1), GenerationChunk("y", (2,), 5, 2)):
        answering.add(0, chunk)
        usage = answering.piece(0, chunk).usage
        assert usage is not None
        counted.append((usage.prompt_tokens, usage.completion_tokens))
    assert counted == [(5, 1), (5, 2)]


def test_log_probabilities_and_echo_are_asked_for_in_the_form_of_each_endpoint() -> None:
    def wanted(request: GenerationFields) -> tuple[int | None, bool]:
        [own] = request.generations("id", None)
        return own.logprobs, own.echo

    assert wanted(chat()) == wanted(chat(logprobs=False)) == wanted(completion(logprobs=False)) == (None, False)
    assert wanted(chat(logprobs=True)) == wanted(completion(logprobs=0)) == (0, False)
    assert wanted(chat(logprobs=True, top_logprobs=3)) == wanted(completion(logprobs=3)) == (3, False)
    assert wanted(completion(echo=True)) == (None, True)
    for fields, param in (({"echo": True, "logprobs": 0}, "echo"), ({"logprobs": 21}, "logprobs")):
        with pytest.raises(ApiError) as caught:
            completion(**fields)
        assert caught.value.param == param


def test_log_probabilities_are_told_in_the_form_of_each_endpoint_and_offsets_go_on_from_chunk_to_chunk() -> None:
    first, second = TokenLogprobs("é", -0.5, ((" b", -0.1), ("é", -0.5))), TokenLogprobs(" c", -2.0, ((" b", -0.2),))
    chunks = [GenerationChunk("é", (1,), 5, 1, None, (first,)), GenerationChunk(" c", (2,), 5, 2, "stop", (second,))]
    text, spoken = (Answering("id", "m", "rev", chat, 1, False) for chat in (False, True))
    pieces = []
    for chunk in chunks:
        text.add(0, chunk)
        spoken.add(0, chunk)
        pieces.append(text.piece(0, chunk).choices[0].logprobs)
    assert [piece and piece["text_offset"] for piece in pieces] == [[0], [1]]
    whole = Answering("id", "m", "rev", False, 1, False)
    for chunk in chunks:
        whole.add(0, chunk)
    assert whole.whole().choices[0].logprobs == {
        "tokens": ["é", " c"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{" b": -0.1, "é": -0.5}, {" b": -0.2, " c": -2.0}],
        "text_offset": [0, 1],
    }
    told = spoken.whole().choices[0].logprobs
    assert told is not None
    assert told["content"][0] == {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [
            {"token": " b", "logprob": -0.1, "bytes": [32, 98]},
            {"token": "é", "logprob": -0.5, "bytes": [195, 169]},
        ],
    }


def test_pages_follow_each_other_without_gap_or_overlap() -> None:
    ids, seen, after = sorted(f"m{i}" for i in range(10)), [], None
    while True:
        got, has_more = page(ids, after, 3)
        seen += got
        after = got[-1]
        if not has_more:
            break
    assert seen == ids
    assert page(ids, "m4x", 2) == (["m5", "m6"], True)
