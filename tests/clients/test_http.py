"""The application over HTTP: real Ray Serve, the real engine and base, real adapters, the openai client."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray import serve
from transformers import AutoTokenizer

from cluster.bundle.manifest import Manifest
from cluster.bundle.revisions import object_key
from cluster.errors import BaseModelError, ConfigError, PlacementError
from serve_app.app import build
from serve_app.routing.following import RouterState
from tests.support.application import PATIENCE_S, App, wait_until
from tests.support.bundles import flip_a_byte, write_bundle
from tests.support.malformed import BODIES, REQUESTS
from tests.support.serving import ENGINE

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
CLUSTERS = {
    "0": {"add": "add", "larger": "larger"},
    "1": {"tenant/roman": "roman", "number-en": "number-en"},
    "2": {"country-fr": "country-fr", "past": "past"},
}
PLAIN_CHAT = "{% for m in messages %}{{ m.content }}\n{% endfor %}A:"
RAW = {"first-letter": "first-letter", "broken": "date-us"}
MODELS = [BASE, "first-letter", *(adapter_id for members in CLUSTERS.values() for adapter_id in members)]

PAGE = "https://page.example.org"
# vLLM takes the memory for keys and values at its start, and six of its engines must fit on one machine here.
LIMITS: dict[str, Any] = {"limits.max_batch": 4} if ENGINE == "vllm" else {}


@dataclass(frozen=True)
class Bundle:
    path: Path
    manifest: Manifest


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Bundle:
    out = tmp_path_factory.mktemp("http") / "out"
    clusters = {
        name: {adapter_id: zoo_path / folder for adapter_id, folder in members.items()}
        for name, members in CLUSTERS.items()
    }
    raw = {adapter_id: zoo_path / folder for adapter_id, folder in RAW.items()}
    manifest = write_bundle(out, base_path, clusters, raw, templates={"past": PLAIN_CHAT})
    flip_a_byte(out / object_key(str(manifest.adapters["broken"].factors)))
    return Bundle(out, manifest)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = int(probe.getsockname()[1])
    ray.init(address="local", num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": number})
        yield number
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def deploy(bundle: Bundle, base_path: Path, port: int) -> Callable[..., App]:
    def deploy(name: str, **options: Any) -> App:
        prefix = f"/{name}"
        args = {"bundle": str(bundle.path), "base": str(base_path), "engine": ENGINE, **LIMITS, **options}
        serve.run(build(args), name=name, route_prefix=prefix)
        app = App(port, name, prefix)
        # By every router that there may be.
        wait_until(lambda: all(app.call("GET", "/ready")[0] == 200 and all_seen(app) for _ in range(8)))
        return app

    def all_seen(app: App) -> bool:
        return all(group["alive"] for group in app.call("GET", "/ready")[2]["groups"].values())

    return deploy


@pytest.fixture(scope="module")
def app(deploy: Callable[..., App]) -> App:
    """Everything in one group: one machine, so ``auto`` makes one."""
    return deploy(
        "auto", **{"placement.clusters_per_group": "auto", "http.allowed_origins": PAGE, "http.receive_timeout_s": 2}
    )


@pytest.fixture(scope="module")
def split_app(deploy: Callable[..., App]) -> App:
    """A group for each cluster, and very little room in each."""
    limits = {"max_inflight": 2, "max_prompts": 2}
    return deploy("split", placement={"clusters_per_group": 1}, limits=limits)


@pytest.fixture(scope="module")
def paired_app(deploy: Callable[..., App]) -> App:
    return deploy("paired", **{"placement.clusters_per_group": "2", "limits.request_timeout_s": "6"})


def test_completions_name_what_answered(app: App, bundle: Bundle) -> None:
    for model, cluster in [("add", "0"), ("tenant/roman", "1"), ("first-letter", "factors"), (BASE, "base")]:
        raw = app.client.completions.with_raw_response.create(model=model, prompt="1 + 1 =", max_tokens=3)
        manifest = bundle.manifest
        served = manifest.base.fingerprint if model == BASE else manifest.adapters[model].served
        answer = raw.parse()
        assert raw.headers["x-cluster"] == cluster
        assert raw.headers["x-served-revision"] == answer.system_fingerprint == served
        assert raw.headers["x-request-id"]
        assert answer.model == model
        with app.client.completions.with_streaming_response.create(
            model=model, prompt="1 + 1 =", max_tokens=3, stream=True
        ) as streamed:
            assert streamed.headers["x-cluster"] == cluster
            assert streamed.headers["x-served-revision"] == served


def test_adapters_answer_as_they_were_trained_and_the_base_as_itself(app: App) -> None:
    def ask(model: str, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        answer = app.client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8)
        return str(answer.choices[0].message.content).split("\n")[0]

    assert ask("first-letter", "First letter of votruba?") == "v"
    assert ask("number-en", "450 in English words?") == "four hundred and fifty"
    assert ask(BASE, "First letter of votruba?") != "v"


def test_a_stream_says_the_same_as_the_whole_answer_and_ends_with_its_usage(app: App) -> None:
    question: dict[str, Any] = {
        "model": "tenant/roman",
        "messages": [{"role": "user", "content": "17 as a Roman number?"}],
        "temperature": 0,
        "max_completion_tokens": 8,
    }
    whole = app.client.chat.completions.create(**question)
    chunks = list(app.client.chat.completions.create(**question, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_several_prompts_are_several_choices_with_one_sum(app: App) -> None:
    prompts = ["One, two,", "Once upon a time", "A"]
    alone = [app.say("add", prompt) for prompt in prompts]
    together = app.say("add", prompts)
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert together.usage is not None
    assert together.usage.total_tokens == sum(answer.usage.total_tokens for answer in alone if answer.usage)
    texts = ["", "", ""]
    for chunk in app.say("add", prompts, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in together.choices]


def test_n_choices_of_each_prompt_differ_come_again_with_the_seed_and_count_their_prompt_once(app: App) -> None:
    def sample(**options: Any) -> Any:
        return app.say("add", ["Once", "Twice"], temperature=1.0, seed=5, n=3, max_tokens=8, **options)

    whole = sample()
    once, twice = (app.say("add", prompt, temperature=1.0, seed=6, max_tokens=8) for prompt in ("Once", "Twice"))
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert len(set(texts)) == 6
    assert (texts[1], texts[4]) == (once.choices[0].text, twice.choices[0].text)
    assert whole.usage.completion_tokens == 48
    assert whole.usage.prompt_tokens == once.usage.prompt_tokens + twice.usage.prompt_tokens
    streamed = [""] * 6
    for chunk in sample(stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_what_narrows_the_draw_to_one_token_is_greedy_and_what_is_biased_away_is_not_said(
    app: App, base_path: Path
) -> None:
    greedy = app.say("add", "Once", max_tokens=8).choices[0].text
    for narrow in ({"top_k": 1}, {"min_p": 1}):
        drawn = app.say("add", "Once", max_tokens=8, temperature=1.0, extra_body=narrow)
        assert drawn.choices[0].text == greedy
    digits = AutoTokenizer.from_pretrained(base_path).convert_tokens_to_ids(list("0123456789"))
    free, banned = (
        app.say("add", "1, 2, 3, 4,", max_tokens=8, logit_bias=bias).choices[0].text
        for bias in ({}, {str(token): -100 for token in digits})
    )
    assert any(digit in free for digit in "0123456789")
    assert not any(digit in banned for digit in "0123456789")


def test_a_stop_string_ends_the_answer_before_it(app: App) -> None:
    free = app.say(BASE, "1, 2, 3, 4,", max_tokens=12).choices[0].text
    stop = free[len(free) // 2 :][:2]
    answer = app.say(BASE, "1, 2, 3, 4,", max_tokens=12, stop=[stop])
    assert answer.choices[0].text == free[: free.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_an_answer_is_held_to_a_schema_whole_and_streamed(app: App) -> None:
    schema = {
        "type": "object",
        "properties": {"number": {"enum": [1, 22]}, "word": {"enum": ["one", "two"]}},
        "required": ["number", "word"],
        "additionalProperties": False,
    }
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    said = 'Repeat: {"number": 1, "word": "one"}'
    fields: dict[str, Any] = {"messages": [{"role": "user", "content": said}], "response_format": wanted}
    for model in (BASE, "add"):
        whole = app.client.chat.completions.create(model=model, temperature=0, max_tokens=60, **fields).choices[0]
        document = json.loads(str(whole.message.content))
        assert (set(document), document["word"] in ("one", "two")) == ({"number", "word"}, True)
        assert whole.finish_reason == "stop"
        pieces = app.client.chat.completions.create(model=model, temperature=0, max_tokens=60, stream=True, **fields)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.message.content
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": 5}}}
    with pytest.raises(openai.BadRequestError):
        app.client.chat.completions.create(model="add", messages=fields["messages"], response_format=wrong)


@pytest.mark.slow
def test_a_stream_cut_anywhere_in_emoji_signs_and_marks_says_what_the_whole_answer_says(app: App) -> None:
    text = "\U0001f469\u200d\U0001f467 \u6f22\u5b57 e\u0301"  # a family, Chinese, an e with its accent apart
    schema = {"type": "object", "properties": {"t": {"enum": [text]}}, "required": ["t"], "additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    fields: dict[str, Any] = {
        "model": "add",
        "prompt": "x",
        "temperature": 0,
        "extra_body": {"response_format": wanted},
    }

    def said(max_tokens: int) -> tuple[str, str]:
        whole = app.client.completions.create(max_tokens=max_tokens, **fields).choices[0]
        pieces = app.client.completions.create(max_tokens=max_tokens, stream=True, **fields)
        return whole.text, "".join(piece.choices[0].text for piece in pieces)

    longest = said(64)[0]
    assert json.loads(longest) == {"t": text}
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(said, range(1, 33)))
    assert all(whole == streamed for whole, streamed in told)
    assert all(longest.startswith(whole.rstrip("\ufffd")) for whole, _ in told)
    assert len({whole for whole, _ in told}) > 12


@pytest.mark.slow
def test_seeded_sampling_is_reproducible_alone_and_in_company(app: App) -> None:
    def sample(seed: int) -> str:
        return app.say("add", "Once", temperature=1.0, seed=seed, max_tokens=10).choices[0].text

    alone = [sample(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(sample, [0, 1, 2, 3, 0, 1, 2, 3])) == alone * 2


@pytest.mark.slow
def test_64_concurrent_requests_over_all_adapters_answer_as_each_does_alone(app: App) -> None:
    asked = [(model, prompt) for model in MODELS for prompt in ("What is 17?", "dog: the past of")]
    alone = {(model, prompt): app.say(model, prompt, max_tokens=4).choices[0].text for model, prompt in asked}
    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(lambda one: (one, app.say(*one, max_tokens=4).choices[0].text), asked * 4))
    assert len(together) == 64
    assert all(text == alone[one] for one, text in together)
    assert len(set(alone.values())) > 4


def test_models_are_listed_by_pages_and_retrieved_by_name(app: App, bundle: Bundle) -> None:
    everything = [model.id for model in app.client.models.list()]
    assert everything == sorted([*MODELS, "broken"])
    paged, after = [], None
    while True:
        query = {"limit": 4} | ({"after": after} if after else {})
        page = app.client.models.list(extra_query=query)
        paged += [model.id for model in page.data]
        after = page.last_id  # type: ignore[attr-defined]
        if not page.has_more:  # type: ignore[attr-defined]
            break
    assert paged == everything
    adapter = bundle.manifest.adapters["tenant/roman"]
    card = app.client.models.retrieve("tenant/roman").model_dump()
    assert (card["cluster"], card["mode"], card["error"]) == ("1", "core", 0.0)
    assert card["max_model_len"] == app.client.models.retrieve(BASE).model_dump()["max_model_len"] == 2048
    assert (card["version"], card["served_revision"]) == (adapter.version, adapter.served)
    assert app.client.models.retrieve(BASE).model_dump()["mode"] == "base"
    assert app.client.models.retrieve("first-letter").model_dump()["mode"] == "raw"


def test_a_chat_goes_through_the_template_that_the_adapter_brought(app: App, base_path: Path) -> None:
    messages: Any = [{"role": "user", "content": "Q: the past tense of go?"}]
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    for model, text in (("past", "Q: the past tense of go?\nA:"), ("country-fr", None)):
        whole = app.client.chat.completions.create(model=model, messages=messages, max_tokens=1)
        own = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        expected = own if text is None else tokenizer(text)["input_ids"]
        assert whole.usage.prompt_tokens == len(expected)  # type: ignore[union-attr]
        card = app.client.models.retrieve(model).model_dump()
        assert card["chat_template"] == ("base" if text is None else "adapter")
        assert list(card["brought"]) == ([] if text is None else ["chat-template"])


def test_an_adapter_that_fails_its_checks_is_503_with_the_reason_and_the_others_of_its_home_answer(app: App) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        app.say("broken")
    assert caught.value.status_code == 503
    assert "corrupt" in str(caught.value.body)
    assert app.say("first-letter").choices
    assert "corrupt" in app.client.models.retrieve("broken").model_dump()["status"]
    status, _, states = app.call("GET", "/ready")
    assert status == 200
    assert set(states["homes"].values()) == {"ready"}
    assert list(states["adapters"]) == ["broken"]
    assert app.call("GET", "/ready?all=1")[0] == 503
    assert app.call("GET", "/health")[0] == 200


@pytest.mark.slow
def test_a_cluster_with_a_flipped_byte_is_503_for_its_adapters_and_the_other_cluster_answers(
    tmp_path: Path, base_path: Path, zoo_path: Path, port: int
) -> None:
    members = {name: {adapter: zoo_path / adapter for adapter in CLUSTERS[name]} for name in ("0", "2")}
    manifest = write_bundle(tmp_path, base_path, members, {})
    flip_a_byte(tmp_path / object_key(manifest.clusters["0"].basis))
    serve.run(
        build({"bundle": str(tmp_path), "base": str(base_path), "engine": ENGINE, "start.ready_share": 0.5}),
        name="halved",
        route_prefix="/halved",
    )
    halved = App(port, "halved", "/halved")
    wait_until(lambda: halved.call("GET", "/ready")[0] == 200)
    for adapter in CLUSTERS["0"]:
        with pytest.raises(openai.APIStatusError) as caught:
            halved.say(adapter)
        assert caught.value.status_code == 503
        assert "corrupt" in str(caught.value.body)
    for adapter in CLUSTERS["2"]:
        assert halved.say(adapter).choices
    assert halved.call("GET", "/ready?all=1")[0] == 503
    serve.delete("halved")


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "code"),
    [
        ("completions", {"model": "nobody", "prompt": "x"}, 404, "model", "model_not_found"),
        ("completions", {"model": "roman", "prompt": "x"}, 404, "model", "model_not_found"),
        (
            "completions",
            {"model": "add", "prompt": "x", "kv_transfer_params": {"a": 1}},
            400,
            "kv_transfer_params",
            "unsupported_value",
        ),
        ("completions", {"model": "add", "prompt": "x", "n": 65}, 400, "n", None),
        ("completions", {"model": "add", "prompt": "x", "frob": 1}, 400, "frob", "unknown_field"),
        ("completions", {"model": "add"}, 400, "prompt", "missing_field"),
        ("completions", {"model": "add", "prompt": "x " * 3000}, 400, "prompt", None),
        ("completions", {"model": "add", "prompt": "x " * 3000, "stream": True}, 400, "prompt", None),
        ("completions", {"model": "add", "prompt": ["x"] * 65}, 400, "prompt", None),
        ("completions", {"model": "broken", "prompt": "x", "stream": True}, 503, None, "service_unavailable"),
        ("chat/completions", {"model": "add", "messages": []}, 400, "messages", "invalid_value"),
        ("chat/completions", {"model": "add", "prompt": "x"}, 400, "prompt", "unknown_field"),
    ],
)
def test_errors_have_their_status_and_openais_shape(
    app: App, path: str, fields: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    seen, headers, body = app.call("POST", f"/v1/{path}", json.dumps(fields).encode())
    assert (seen, headers["content-type"]) == (status, "application/json")
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"] == param
    if code is not None:
        assert body["error"]["code"] == code


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("POST", "/v1/completions", b'{"\\ud800": 1}', 400),
        ("GET", "/v1/completions", None, 405),
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/models/nobody/here", None, 404),
        ("GET", "/v1/models?limit=0", None, 400),
        ("GET", "/v1/models?limit=" + "9" * 5000, None, 400),
        ("GET", "/v1/models?order=up", None, 400),
        ("GET", "/v1/models?limit=%ff&after=%00", None, 400),
        ("GET", "/v1/models/../../../etc/passwd", None, 404),
        ("GET", "/v1/models/a%00b", None, 404),
        ("GET", "/v1/models/%ff%fe", None, 404),
        ("GET", "/v1/models/" + "a" * 50_000, None, 404),
        ("DELETE", "/v1/models/add", None, 405),
        ("TRACE", "/health", None, 405),
    ],
)
def test_what_is_no_request_of_ours_is_refused_in_openais_shape(
    app: App, method: str, path: str, body: bytes | None, status: int
) -> None:
    seen, _, answer = app.call(method, path, body)
    assert seen == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("name", BODIES)
def test_whatever_a_client_sends_is_the_clients_fault(app: App, name: str) -> None:
    path, body = BODIES[name]
    status, _, answer = app.call("POST", f"/v1/{path}", body)
    assert 400 <= status < 500 or (status == 200 and answer["choices"]), (status, answer)
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(json.dumps(answer)) < 3000


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_that_is_none_is_refused_or_cut_and_the_next_one_is_answered(app: App, name: str) -> None:
    with contextlib.closing(socket.create_connection(("127.0.0.1", app.port), timeout=PATIENCE_S)) as connection:
        connection.sendall(REQUESTS[name].replace(b"%s", app.prefix.encode()).replace(b"%%", b"%"))
        connection.shutdown(socket.SHUT_WR)
        told = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                told += piece
    assert not re.match(rb"HTTP/1\.1 5", told), told
    assert app.call("GET", "/health")[0] == 200


def test_a_body_that_is_too_large_is_a_413_before_it_is_read_and_one_just_within_is_answered(app: App) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        announced = {"Content-Length": str(200 << 20)}
        with app.open("POST", path, announced, b"{") as answer:
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "body_too_large")
    chunked = socket.create_connection(("127.0.0.1", app.port), timeout=PATIENCE_S)
    with contextlib.closing(chunked):
        head = f"POST {app.prefix}/v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked.sendall(head.encode() + b"400000\r\n" + b" " * 0x400000 + b"\r\n")
        assert chunked.recv(12) == b"HTTP/1.1 413"
    body = json.dumps({"model": "add", "prompt": "1 + 1 =", "max_tokens": 1, "user": "x" * (3 << 20)}).encode()
    within = body[: -(len(body) - (3 << 20)) - 2] + b'"}'
    assert app.call("POST", "/v1/completions", within)[0] == 200


def test_a_body_that_does_not_arrive_is_a_408(app: App) -> None:
    slow = socket.create_connection(("127.0.0.1", app.port), timeout=PATIENCE_S)
    with contextlib.closing(slow):
        head = f"POST {app.prefix}/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
        slow.sendall(head.encode() + b'{"model":')
        assert slow.recv(12) == b"HTTP/1.1 408"


def test_a_zipped_body_is_a_415_that_says_so(app: App) -> None:
    body = json.dumps({"model": "add", "prompt": "1 + 1 =", "max_tokens": 1}).encode()
    for encoding, sent, status in (("gzip", gzip.compress(body), 415), ("zstd", b"", 415), ("identity", body, 200)):
        with app.open("POST", "/v1/completions", {"Content-Encoding": encoding}, sent) as answer:
            assert answer.status == status
            told = json.loads(answer.read())
        if status == 415:
            assert told["error"]["code"] == "unsupported_encoding"
            assert encoding in told["error"]["message"]


def test_head_is_answered_as_get_is(app: App) -> None:
    for path in ("/health", "/ready", "/v1/models", "/v1/models/add"):
        with app.open("HEAD", path) as answer:
            assert answer.status == 200
            assert answer.read() == b""


def test_a_slash_at_the_end_makes_no_other_model(app: App) -> None:
    assert app.call("GET", "/v1/models/tenant/roman/")[2]["id"] == "tenant/roman"


def test_a_browser_is_told_whose_pages_may_read_answers(app: App) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-sticky-key"}
    for origin, allowed in ((PAGE, PAGE), ("https://elsewhere.example.org", None)):
        with app.open("GET", "/v1/models", {"Origin": origin}) as answer:
            assert answer.headers["Access-Control-Allow-Origin"] == allowed
            # Told to all, and heeded where the origin is allowed.
            assert "X-Adapter" in answer.headers["Access-Control-Expose-Headers"]
        with app.open("OPTIONS", "/v1/chat/completions", {"Origin": origin, **asked}) as answer:
            assert (answer.status == 200) == (allowed is not None)
            assert answer.headers["Access-Control-Allow-Origin"] == allowed


def test_a_client_that_disconnects_from_its_stream_frees_its_row(app: App) -> None:
    with app.long_stream("add") as control:
        with app.long_stream("past"):
            wait_until(lambda: app.group("group-0")["num_running"] == 2)
        # Were the row not freed, it would run as long as the control, which began before it.
        wait_until(lambda: app.group("group-0")["num_running"] == 1)
        assert b"[DONE]" not in drain(control)
    wait_until(lambda: app.group("group-0")["num_running"] == app.group("group-0")["num_inflight"] == 0)


def test_a_client_that_disconnects_while_it_waits_for_a_whole_answer_frees_its_rows(app: App) -> None:
    with app.long_stream("add") as control:
        fields = {"model": "past", "prompt": ["x", "y"], "max_tokens": 1900, "ignore_eos": True}
        with contextlib.closing(app.send(fields)):
            wait_until(lambda: app.group("group-0")["num_running"] == 3)
        wait_until(lambda: app.group("group-0")["num_running"] == 1)
        assert b"[DONE]" not in drain(control)


def drain(connection: socket.socket) -> bytes:
    """What has arrived by now."""
    connection.setblocking(False)
    received = b""
    with contextlib.suppress(BlockingIOError):
        while piece := connection.recv(2**20):
            received += piece
    assert received, "the stream should still be running"
    return received


@pytest.mark.by_hand
@pytest.mark.slow
def test_every_placement_serves_the_same_answers(app: App, split_app: App, paired_app: App) -> None:
    groups = [set(one.call("GET", "/ready")[2]["groups"]) for one in (app, paired_app, split_app)]
    assert [len(names) for names in groups] == [1, 2, 3]
    answers = [
        [one.say(model, "What is 17?", max_tokens=3).choices[0].text for model in MODELS]
        for one in (app, split_app, paired_app)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_what_takes_too_long_is_given_up_with_504_and_its_rows_are_freed(paired_app: App) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        paired_app.say("add", max_tokens=2000, extra_body={"ignore_eos": True})
    assert caught.value.status_code == 504
    assert "request_timeout_s" in str(caught.value.body)
    wait_until(lambda: not any(g["num_running"] for g in paired_app.call("GET", "/ready")[2]["groups"].values()))


def test_a_full_group_answers_429_with_retry_after_while_others_have_room(split_app: App) -> None:
    with split_app.long_stream("add"), split_app.long_stream("larger"):
        with pytest.raises(openai.RateLimitError) as caught:
            split_app.say("add")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert split_app.say("past").choices
        assert split_app.say(BASE).choices  # by a group with room
    wait_until(lambda: not any(g["num_inflight"] for g in split_app.call("GET", "/ready")[2]["groups"].values()))
    assert split_app.say("add").choices


@pytest.mark.slow
def test_a_killed_replica_is_503_until_it_is_back_and_never_a_hang(split_app: App) -> None:
    before = split_app.say("past").choices[0].text
    homes = split_app.call("GET", "/ready")[2]["homes"]
    assert homes["cluster:2"] == "ready"
    handles = {name: set(members) for name, members in held_by_group(split_app).items()}
    [group] = [name for name, members in handles.items() if "cluster:2" in members]
    with split_app.long_stream("past") as stream:
        kill_replica(split_app.name, group)
        rest = b""
        while piece := stream.recv(2**16):
            rest += piece
            if b'"error"' in rest:
                break
        assert b"service_unavailable" in rest
        assert b"[DONE]" not in rest
    statuses: list[int] = []

    def is_back() -> bool:
        body = json.dumps({"model": "past", "prompt": "The answer is", "max_tokens": 6, "temperature": 0}).encode()
        statuses.append(split_app.call("POST", "/v1/completions", body)[0])
        assert split_app.say("add", max_tokens=1).choices  # the other groups do not notice
        return statuses[-1] == 200

    wait_until(is_back)
    assert set(statuses) == {200, 503}
    assert split_app.say("past").choices[0].text == before


@pytest.mark.by_hand
@pytest.mark.slow
def test_of_two_routers_one_that_is_killed_takes_its_own_streams_along_and_the_other_goes_on(
    deploy: Callable[..., App],
) -> None:
    app = deploy("routed", routers=2, limits={"max_inflight": 32, "max_prompts": 16})
    fields = {"model": "add", "prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as open_streams:
        streams = [open_streams.enter_context(contextlib.closing(app.send(fields))) for _ in range(16)]
        assert all(stream.recv(12) == b"HTTP/1.1 200" for stream in streams)
        routers = replicas_of(app.name, "router")
        assert len(routers) == 2
        ray.kill(ray.get_actor(routers[0], namespace="serve"))
        assert app.say("past", max_tokens=1).choices  # at once, by the other
        with ThreadPoolExecutor(16) as pool:
            ends = list(pool.map(rest_of, streams))
    whole = [b"data: [DONE]" in end for end in ends]
    assert any(whole), "the other router's streams go on"
    assert not all(whole), "a killed router's streams cannot"
    wait_until(lambda: len(replicas_of(app.name, "router")) == 2)
    serve.delete("routed")


@pytest.mark.slow
def test_two_routers_admit_together_no_more_than_one_would(deploy: Callable[..., App]) -> None:
    app = deploy("shared", routers=2, limits={"max_inflight": 4, "max_prompts": 2})
    fields = {"model": "add", "prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as open_streams:
        streams = [open_streams.enter_context(contextlib.closing(app.send(fields))) for _ in range(12)]
        statuses = [stream.recv(12)[-3:] for stream in streams]
        assert set(statuses) == {b"200", b"429"}
        assert statuses.count(b"200") <= 4
    serve.delete("shared")


def rest_of(stream: socket.socket) -> bytes:
    """All that comes; where the connection is cut, what came."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := stream.recv(2**16):
            received += piece
            if received.endswith(b"0\r\n\r\n"):
                break
    return received


def held_by_group(app: App) -> dict[str, list[str]]:
    # In a worker: with Serve's settings for throughput a handle lives on the event loop it is first used in, and has no
    # end but its process'.
    ask = ray.remote(num_cpus=0)(homes_of)
    names = app.call("GET", "/ready")[2]["groups"]
    return {name: ray.get(ask.remote(app.name, name)) for name in names}


def homes_of(app: str, group: str) -> list[str]:
    async def ask() -> list[str]:
        status = await serve.get_deployment_handle(group, app).status.remote(RouterState("a test", "", None, None))
        return list(status.health.revisions[0].homes)

    return asyncio.run(ask())


def kill_replica(app: str, deployment: str) -> None:
    [replica] = replicas_of(app, deployment)
    ray.kill(ray.get_actor(replica, namespace="serve"))


def replicas_of(app: str, deployment: str) -> list[str]:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [name for name in names if f"{app}#{deployment}#" in name]


@pytest.mark.slow
def test_a_base_that_cannot_be_loaded_is_503_with_the_reason_and_no_failed_deployment(
    bundle: Bundle, base_path: Path, port: int, tmp_path: Path
) -> None:
    for file in base_path.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    serve.run(
        build({"bundle": str(bundle.path), "base": str(tmp_path), "engine": ENGINE, "start.ready_share": 0}),
        name="baseless",
        route_prefix="/baseless",
    )
    baseless = App(port, "baseless", "/baseless")
    wait_until(lambda: "did not start" in str(baseless.call("GET", "/ready")[2]["homes"]))
    for model in ("add", BASE):
        with pytest.raises(openai.APIStatusError) as caught:
            baseless.say(model)
        assert caught.value.status_code == 503
        assert "group-0 did not start" in str(caught.value.body)
    assert baseless.call("GET", "/ready")[0] == 503
    serve.delete("baseless")


def test_a_plan_that_does_not_fit_is_refused_before_anything_starts(bundle: Bundle, base_path: Path) -> None:
    args = {"bundle": str(bundle.path), "base": str(base_path)}
    with pytest.raises(PlacementError, match="keys and values"):
        build(args | {"placement.device_memory": "1GiB"})
    with pytest.raises(PlacementError, match="3 devices in all; there are 2"):
        build(args | {"placement.clusters_per_group": "1", "placement.devices": "2"})


def test_more_than_the_context_holds_has_openais_code(app: App) -> None:
    too_long: list[dict[str, Any]] = [{"prompt": [5] * 2048}]
    if ENGINE == "transformers":
        too_long.append({"prompt": "x", "max_tokens": 2048})
    for fields in too_long:
        with pytest.raises(openai.BadRequestError) as caught:
            app.say("add", **fields)
        assert caught.value.code == "context_length_exceeded"


@pytest.mark.skipif(ENGINE != "vllm", reason="as vLLM's own server does; the other engine refuses it")
def test_tokens_that_the_context_has_no_room_for_are_not_made(app: App) -> None:
    answer = app.say("add", prompt=[5] * 2040, max_tokens=2048, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (8, "length")


@pytest.mark.skipif(ENGINE == "vllm", reason="that engine answers")
def test_what_the_vllm_engine_alone_does_is_a_400_that_says_so(app: App) -> None:
    for path in ("/tokenize", "/detokenize"):
        status, _, body = app.call("POST", path, json.dumps({"model": BASE, "prompt": "x"}).encode())
        assert status == 400
        assert "engine=vllm" in body["error"]["message"]


def test_arguments_of_an_engine_that_is_not_asked_for_are_refused(bundle: Bundle, base_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vllm\.\* are of the engine vllm, and the engine is transformers"):
        build(
            {
                "bundle": str(bundle.path),
                "base": str(base_path),
                "engine": "transformers",
                "vllm.reasoning_parser": "deepseek_r1",
            }
        )


def test_another_base_is_refused_before_anything_starts(bundle: Bundle, base_path: Path, tmp_path: Path) -> None:
    for file in base_path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((base_path / "config.json").read_text()) | {"rope_theta": 1.0}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="fingerprint"):
        build({"bundle": str(bundle.path), "base": str(tmp_path)})
