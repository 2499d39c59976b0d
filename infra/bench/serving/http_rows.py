"""The same over HTTP: our whole stack beside vLLM's own OpenAI server, both asked by the openai client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import openai

from cluster.bundle.reading import Bundle
from infra.bench.serving.load import Question
from infra.demo.application import free_port, set_up_serve
from infra.ready import wait_until_ready
from serve_app.engine.vllm.options import VllmSettings, base_options

START_TIMEOUT_S = 300


class HttpRow:
    """Asks ``models``, one for each adapter of the collection, or the one base model for all."""

    resident_bytes = 0

    def __init__(self, name: str, url: str, models: Sequence[str], start_s: float, stop: Callable[[], Any]) -> None:
        self.name, self.start_s, self._models, self._stop = name, start_s, models, stop
        self._client = openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=START_TIMEOUT_S)

    async def ask(self, question: Question, answer_tokens: int) -> AsyncIterator[int]:
        chunks = await self._client.completions.create(
            model=self._models[question.adapter % len(self._models)],
            prompt=list(question.prompt_ids),
            max_tokens=answer_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        async for chunk in chunks:
            # A token may show as no text yet; how many there were is said at the end.
            yield chunk.usage.completion_tokens if chunk.usage else 0

    async def close(self) -> None:
        await self._client.close()
        await asyncio.to_thread(self._stop)


async def start_vllm_server(name: str, base: Path, settings: VllmSettings) -> HttpRow:
    """vLLM's own server, LoRA off."""
    began = time.perf_counter()
    port = free_port()
    line = vllm_server_line(base, settings, port)
    process = await asyncio.to_thread(subprocess.Popen, line, stdout=sys.stderr, stderr=sys.stderr)

    def stop() -> None:
        process.terminate()
        process.wait()

    try:
        url = f"http://127.0.0.1:{port}/health"
        await asyncio.to_thread(wait_until_ready, url, START_TIMEOUT_S, lambda: process.poll() is None)
    except BaseException:
        stop()
        raise
    return HttpRow(name, f"http://127.0.0.1:{port}/v1", ["base"], time.perf_counter() - began, stop)


def vllm_server_line(base: Path, settings: VllmSettings, port: int) -> list[str]:
    """The command of vLLM's own server on 127.0.0.1, which serves ``base`` by the name "base"."""
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for key, value in base_options(base, settings).items():
        flag = key.replace("_", "-")
        line += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    line += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
    return [*line, "--disable-uvicorn-access-log"]


async def start_stack(
    names: Sequence[str], base: Path, settings: VllmSettings, bundle: Bundle, adapters: Sequence[str]
) -> list[HttpRow]:
    """HTTP proxy, router and one replica with all homes, in Ray. Two rows on the one application: the first asks for
    the base, the second for the adapters."""
    set_up_serve()
    import ray
    from ray import serve

    from serve_app.app import build

    began = time.perf_counter()
    port = free_port()

    def start() -> None:
        # Ray's CPUs are tickets: one for each of this machine's is the replica's, two more are for Serve's own actors.
        num_cpus = settings.num_threads or 1
        ray.init(address="local", num_cpus=num_cpus + 2, include_dashboard=False, object_store_memory=200 << 20,
                 log_to_driver=False)  # fmt: skip
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {
            "bundle": bundle.address,
            "revision": bundle.manifest.revision,
            "base": str(base),
            "engine": "vllm",
            "device": settings.device,
            "dtype": settings.dtype,
            "placement": {"num_cpus": num_cpus},
            "limits": {"max_batch": settings.max_batch, "max_model_len": settings.max_model_len},
        }
        serve.run(build(arguments), name="bench")

    try:
        await asyncio.to_thread(start)
        await asyncio.to_thread(wait_until_ready, f"http://127.0.0.1:{port}/ready?all=1", START_TIMEOUT_S)
    except BaseException:
        ray.shutdown()
        raise
    url, seconds = f"http://127.0.0.1:{port}/v1", time.perf_counter() - began
    models: list[Sequence[str]] = [[bundle.manifest.base.name], adapters]
    return [HttpRow(name, url, own, seconds, ray.shutdown) for name, own in zip(names, models, strict=True)]
