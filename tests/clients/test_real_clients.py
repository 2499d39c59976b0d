"""Real clients, as shipped, against the application over HTTP. Those that do not install beside each other have an
environment of their own. With ENGINE=vllm, in vLLM's environment, also what that engine alone honours."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.support.environments import environment
from tests.support.jobs import FEW, copy_adapters, run_job
from tests.support.paths import REPOSITORY
from tests.support.serving import ENGINE, application, ray_with_serve

pytestmark = [pytest.mark.slow, pytest.mark.by_hand]
on_vllm = pytest.mark.skipif(ENGINE != "vllm", reason="ENGINE=vllm, in vLLM's environment")

BASE, ADAPTER = "HuggingFaceTB/SmolLM2-135M-Instruct", FEW[0]
PROGRAMS = REPOSITORY / "tests" / "clients" / "programs"
MESSAGES: Any = [{"role": "user", "content": "Say three words."}]


class Person(BaseModel):
    name: Literal["Ann", "Bob"]
    is_here: bool


LOOK: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "enum": ["Ann", "Bob"]}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("real")
    arguments: dict[str, Any] = {"bundle": str(folder / "out"), "base": str(base_path)}
    if ENGINE == "vllm":
        arguments["vllm"] = {"tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    with ray_with_serve() as port:
        run_job(copy_adapters(zoo_path, folder / "adapters"), base_path, folder / "out", clusters=2, rank=16)
        with application(port, **arguments) as client:
            yield client


def url(client: openai.OpenAI) -> str:
    return str(client.base_url).removesuffix("/")


def run(*command: str, **more: str) -> str:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | offline | more)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def told_by(program: str, name: str, client: openai.OpenAI, model: str) -> Any:
    python = str(environment(name) / "python")
    return json.loads(run(python, str(PROGRAMS / program), url(client), model).splitlines()[-1])


# openai-python.


@pytest.mark.parametrize("model", [BASE, ADAPTER])
def test_openai_python_whole_streamed_by_its_helper_and_asynchronous(client: openai.OpenAI, model: str) -> None:
    # The helper raises where an answer is cut by its length.
    fields: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 60, "stop": "e"}
    text = client.chat.completions.create(**fields).choices[0].message.content
    assert text
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        assert {"chunk", "content.delta", "content.done"} <= kinds
        assert stream.get_final_completion().choices[0].message.content == text

    async def asynchronous() -> str | None:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as own:
            return (await own.chat.completions.create(**fields)).choices[0].message.content

    assert asyncio.run(asynchronous()) == text


def test_openai_python_plays_an_answer_back(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": ADAPTER, "temperature": 0, "max_tokens": 8}
    first = client.chat.completions.create(messages=MESSAGES, **fields).choices[0].message
    history = [*MESSAGES, first, {"role": "user", "content": "And three more."}]
    assert client.chat.completions.create(messages=history, **fields).choices[0].message.content


def test_openai_python_parses_a_structured_answer(client: openai.OpenAI) -> None:
    asked: Any = [{"role": "user", "content": 'Repeat: {"name": "Ann", "is_here": true}'}]
    fields: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 200}
    parsed = client.chat.completions.parse(messages=asked, response_format=Person, **fields)
    assert isinstance(parsed.choices[0].message.parsed, Person)


@on_vllm
def test_openai_python_calls_tools_and_plays_the_call_back(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": BASE, "temperature": 0, "max_tokens": 96}
    tools: dict[str, Any] = {"tools": [LOOK], "tool_choice": "required"}
    called = client.chat.completions.create(messages=MESSAGES, **tools, **fields).choices[0]
    [made, *_] = called.message.tool_calls or ()
    assert called.finish_reason in ("tool_calls", "stop")
    with client.chat.completions.stream(messages=MESSAGES, **tools, **fields) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert [c.function.arguments for c in streamed.tool_calls or ()] == [  # type: ignore[union-attr]
        c.function.arguments
        for c in called.message.tool_calls or ()  # type: ignore[union-attr]
    ]
    history = [*MESSAGES, called.message, {"role": "tool", "tool_call_id": made.id, "content": "At home."}]
    assert client.chat.completions.create(messages=history, tools=[LOOK], tool_choice="none", **fields).choices


# Others, each in an environment of its own.


def test_langchain_chats_and_plays_answers_back(client: openai.OpenAI) -> None:
    told = told_by("langchain_chat.py", "langchain", client, ADAPTER)
    assert told["first"]
    assert told["second"] == told["streamed"]


@on_vllm
def test_langchain_loops_over_tool_calls_for_three_turns(client: openai.OpenAI) -> None:
    told = told_by("langchain_loop.py", "langchain", client, BASE)
    assert len(told["calls"]) == 2
    assert all(call["name"] in ("Ann", "Bob") for turn in told["calls"] for call in turn)
    assert {"human", "ai", "tool"} == set(told["turns"])
    assert told["last"] == told["streamed"]
    assert told["person"]["name"] in ("Ann", "Bob")


def test_litellm_chats_completes_streams_and_is_told_of_an_unknown_model(client: openai.OpenAI) -> None:
    told = told_by("litellm_answers.py", "litellm", client, ADAPTER)
    assert told["chat"]
    assert told["chat"] == told["streamed"]
    assert told["text"]
    assert told["tokens"] > 0
    assert told["unknown"] == "NotFoundError"


def test_guidellm_measures_without_an_error(client: openai.OpenAI, base_path: Path, tmp_path: Path) -> None:
    program = str(environment("guidellm") / "guidellm")
    run(
        *(program, "run", "--backend", f"kind=openai_http,target={url(client).removesuffix('/v1')},model={ADAPTER}"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"),
        *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=8"),
        *("--tokenizer", f"kind=hf_auto,model={base_path}"),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console"),
    )
    [benchmark] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0)
    assert benchmark["metrics"]["output_token_count"]["successful"]["mean"] > 0


@on_vllm
def test_vllm_bench_serve_measures_without_an_error(client: openai.OpenAI, base_path: Path, tmp_path: Path) -> None:
    # Not by the command `vllm`, which asks for a version that the CPU build does not have.
    bench = "from vllm.benchmarks.serve import *; p = FlexibleArgumentParser(); add_cli_args(p); main(p.parse_args())"
    run(
        *(sys.executable, "-c", f"from vllm.utils.argparse_utils import FlexibleArgumentParser; {bench}"),
        *("--backend", "openai", "--model", ADAPTER),
        *("--base-url", url(client).removesuffix("/v1"), "--tokenizer", str(base_path), "--num-prompts", "6"),
        *("--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"),
        *("--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"),
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 6
    assert result["total_output_tokens"] > 0
