"""Our application with the vLLM engine beside vLLM's own server, over HTTP: the same answers, whole and streamed, for
the base, and for an adapter that was exported and that vLLM has as a LoRA of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.bundle.export import export_adapter
from cluster.bundle.reading import Bundle
from infra.bench.serving.http_rows import vllm_server_line
from infra.ready import wait_until_ready
from serve_app.engine.vllm.options import VllmSettings
from tests.support.environments import environment
from tests.support.jobs import FEW, copy_adapters, run_job
from tests.support.ray_heads import free_port
from tests.support.serving import ENGINE, PATIENCE_S, application, ray_with_serve
from tests.support.vllm_bodies import BODIES, CHAT, TOOL, events, same, told_by

pytestmark = [pytest.mark.slow, pytest.mark.skipif(ENGINE != "vllm", reason="ENGINE=vllm, in vLLM's environment")]

BASE, ADAPTER = "HuggingFaceTB/SmolLM2-135M-Instruct", FEW[0]
SETTINGS: Any = {"max_batch": 8, "max_model_len": 1024, "num_threads": 1}
FORCED = r'<tool_call>\n\{"name": "look", "arguments": \{"name": "[A-Z][a-z]{1,6}"\}\}\n</tool_call>'
TOOLS: dict[str, dict[str, Any]] = {
    "a tool call": {"messages": CHAT, "tools": [TOOL], "structured_outputs": {"regex": FORCED}, "max_tokens": 48},
    "a tool that is required": {"messages": CHAT, "tools": [TOOL], "tool_choice": "required", "max_tokens": 48},
    "a tool by name": {
        "messages": CHAT,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "look"}},
        "max_tokens": 48,
    },
}
ALL = BODIES | TOOLS
# What is drawn hangs on the last bit of a logit, and an adapter's are the sums of other products here.
GREEDY = [name for name, body in ALL.items() if not body.get("temperature")]


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Iterator[tuple[str, str]]:
    """Of our application and of vLLM's server, without /v1."""
    folder = tmp_path_factory.mktemp("beside")
    with ray_with_serve() as proxy:
        run_job(copy_adapters(zoo_path, folder / "adapters"), base_path, folder / "out", clusters=2, rank=16)
        exported, port = folder / "exported", free_port()
        export_adapter(Bundle.open(str(folder / "out")), ADAPTER, exported)
        rank = json.loads((exported / "adapter_config.json").read_text())["r"]
        line = vllm_server_line(base_path, VllmSettings(**SETTINGS, kv_bytes=400 << 20), port)
        line[line.index("--served-model-name") + 1] = BASE
        line += ["--enable-lora", "--lora-modules", f"{ADAPTER}={exported}", "--max-lora-rank", str(max(16, rank))]
        line += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
        arguments: dict[str, Any] = {
            "bundle": str(folder / "out"),
            "base": str(base_path),
            "limits": {"max_batch": SETTINGS["max_batch"], "max_model_len": SETTINGS["max_model_len"]},
            "vllm": {"tool_call_parser": "hermes", "enable_auto_tool_choice": True},
        }
        theirs = f"http://127.0.0.1:{port}"
        with own_server(line, theirs), application(proxy, **arguments) as client:
            yield str(client.base_url).removesuffix("/v1/"), theirs


@contextlib.contextmanager
def own_server(line: list[str], url: str) -> Iterator[None]:
    process = subprocess.Popen(line, env=os.environ | {"VLLM_NO_USAGE_STATS": "1"})
    try:
        wait_until_ready(f"{url}/health", PATIENCE_S, lambda: process.poll() is None)
        yield
    finally:
        process.terminate()
        process.wait(30)


def ask(url: str, path: str, body: dict[str, Any]) -> str:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}{path}: {error.code} {error.read().decode()}") from None


def close(own: Any, theirs: Any, within: float) -> bool:
    """Equal, and numbers nearly; token ids and counts are no such numbers."""
    if isinstance(own, float) and isinstance(theirs, float):
        return abs(own - theirs) <= within
    if isinstance(own, list) and isinstance(theirs, list):
        return len(own) == len(theirs) and all(map(lambda a, b: close(a, b, within), own, theirs))
    if isinstance(own, dict) and isinstance(theirs, dict):
        return own.keys() == theirs.keys() and all(close(own[key], theirs[key], within) for key in own)
    return type(own) is type(theirs) and own == theirs


def bodies(name: str, model: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The path, and what we and what vLLM are asked: its template knows no developer; here that is the system."""
    body = {"model": model, "temperature": 0, "max_tokens": 8} | ALL[name]
    body.pop("stream_options", None)
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return path, body, json.loads(json.dumps(body).replace('"developer"', '"system"'))


@pytest.mark.parametrize(("model", "name"), [*((BASE, name) for name in ALL), *((ADAPTER, name) for name in GREEDY)])
def test_the_answer_is_vllms_own_whole_and_streamed(urls: tuple[str, str], model: str, name: str) -> None:
    own, theirs = urls
    within = 1e-3 if model == BASE else 2e-2
    path, asked, of_them = bodies(name, model)
    whole = [same(json.loads(ask(*one))) for one in ((own, path, asked), (theirs, path, of_them))]
    assert close(*map(without_chance, whole), within), whole
    more = {"stream": True, "stream_options": ALL[name].get("stream_options", {"include_usage": True})}
    told = [told_by(events(ask(*one))) for one in ((own, path, asked | more), (theirs, path, of_them | more))]
    assert close(*map(without_chance, map(as_document, told)), within), told


def as_document(told: Any) -> Any:
    return json.loads(json.dumps(told))


def without_chance(document: Any) -> Any:
    """Tool calls have ids of chance."""
    if isinstance(document, list):
        return [without_chance(item) for item in document]
    if isinstance(document, dict):
        return {key: without_chance(value) for key, value in document.items() if key != "id"}
    return document


def test_tokens_are_vllms_own(urls: tuple[str, str]) -> None:
    for body in ({"prompt": "One, two", "return_token_strs": True}, {"messages": CHAT}):
        told = [json.loads(ask(url, "/tokenize", {"model": ADAPTER} | body)) for url in urls]
        assert told[0] == told[1]
        texts = [json.loads(ask(url, "/detokenize", {"model": BASE, "tokens": told[0]["tokens"]})) for url in urls]
        assert texts[0] == texts[1]


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"question": "The sky is", "choices": ["blue", "square", "late"], "answer": 0},
    {"question": "Grass is", "choices": ["angry", "green"], "answer": 1},
    {"question": "Snow is", "choices": ["white", "twelve"], "answer": 0},
]


def test_lm_eval_is_told_the_same_log_probabilities(urls: tuple[str, str], base_path: Path, tmp_path: Path) -> None:
    """Its local-completions as shipped, which asks for the log probabilities of prompts. One request at a time: with
    LoRA on, two at once end the engine of vLLM's own CPU build (0.32.0; an einsum of unequal sizes)."""
    program = str(environment("lm-eval") / "lm_eval")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "colours.yaml").write_text(TASK.format(rows=rows))
    told = []
    for number, url in enumerate(urls):
        out = tmp_path / str(number)
        model = f"model={BASE},base_url={url}/v1/completions,tokenizer={base_path},num_concurrent=1,max_retries=1"
        command = [program, "run", "--model", "local-completions", "--model_args", model, "--tasks", "colours"]
        command += ["--include_path", str(tmp_path), "--output_path", str(out), "--log_samples"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=400, env=os.environ | {"OPENAI_API_KEY": "none"}
        )
        if done.returncode:
            pytest.fail("\n".join(line for line in done.stderr.splitlines() if "API" in line or "Error" in line))
        [samples] = out.rglob("samples_*.jsonl")
        told.append([json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()])
    assert sum(map(len, told[0])) == sum(len(row["choices"]) for row in ROWS)  # type: ignore[arg-type]
    for own, theirs in zip(*told, strict=True):
        for (a, greedy_a), (b, greedy_b) in zip(own, theirs, strict=True):
            assert abs(float(a) - float(b)) < 0.05
            assert greedy_a == greedy_b
