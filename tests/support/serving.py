"""A Ray with Serve on a free port, applications on it, and PEFT beside it as the oracle."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import ray
import torch
from peft import PeftModel
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.ready import wait_until_ready
from serve_app.app import build

# ENGINE=vllm runs the tests that stand on this file with the other engine, which takes its time to start.
ENGINE = os.environ.get("ENGINE", "transformers")
PATIENCE_S = 120.0 if ENGINE == "transformers" else 300.0


@contextlib.contextmanager
def ray_with_serve(num_cpus: int = 8) -> Iterator[int]:
    """Yields the port of Serve's HTTP proxy. ``num_cpus`` is what Ray believes, so that all replicas fit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # As serve_app/README.md has it: Serve's controller reads it from its environment, which is this process's.
    os.environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] = "1"
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield port
    finally:
        ray.shutdown()


@contextlib.contextmanager
def application(port: int, **args: Any) -> Iterator[openai.OpenAI]:
    """``serve_app`` with ``args``, ready with every home; removed again at the end."""
    name = f"app-{time.monotonic_ns()}"
    serve.run(build({"engine": ENGINE, **args}), name=name, route_prefix=f"/{name}")
    url = f"http://127.0.0.1:{port}/{name}"
    wait_until_ready(f"{url}/ready?all=1", PATIENCE_S)
    try:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    finally:
        serve.delete(name)


def ask(client: openai.OpenAI, model: str, prompt: str, num_tokens: int) -> str:
    """Greedy, exactly ``num_tokens`` tokens."""
    answer = client.completions.create(
        model=model, prompt=prompt, max_tokens=num_tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == num_tokens
    return answer.choices[0].text


def ask_all_at_once(client: openai.OpenAI, prompts: Mapping[str, str], num_tokens: int) -> dict[str, str]:
    """One request a model, all in flight together."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = pool.map(lambda item: ask(client, *item, num_tokens), prompts.items())
        return dict(zip(prompts, answers, strict=True))


class Peft:
    """The base in float32 with PEFT adapters on it, one at a time."""

    def __init__(self, base: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.base: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        # As with the application's ignore_eos: an end of sequence is a token like others.
        self.base.generation_config.eos_token_id = None

    def answer(self, folder: Path | None, prompt: str, num_tokens: int) -> str:
        """Greedy, exactly ``num_tokens`` tokens, of the adapter in ``folder`` (None: of the base)."""
        model = PeftModel.from_pretrained(self.base, folder) if folder else self.base
        batch = self.tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=num_tokens, do_sample=False)
        if folder:
            model.unload()
        text: str = self.tokenizer.decode(ids[0, batch.input_ids.shape[1] :], skip_special_tokens=True)
        return text
