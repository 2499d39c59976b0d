"""What the way over HTTP costs, process by process, beside vLLM's own server.

    .venv-vllm/bin/python -m infra.bench.http --base build/base --out FILE

Each row is a server that is started, asked and ended by itself: vLLM's own, and our stack (HTTP proxy, router, replica)
with Ray Serve's Python proxy and with its HAProxy. Our engine costs nothing here: at every step each stream gets a
token (``--step-ms``); the rows "vllm" have the real one in it, on the base that vLLM's server has, which is a tiny one
with random weights. What is counted is CPU time of processes, not of the clients and not of engines: CPU microseconds a
streamed token and an answer that is not streamed. vLLM's server is its API process alone. Last line: JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.adapters.base import read_base
from cluster.bundle.reading import Bundle
from infra.bench.homes import write_bundle, write_cores
from infra.bench.http import load, processes
from infra.bench.http.free_engine import STEP_SETTING
from infra.bench.serving.http_rows import START_TIMEOUT_S, vllm_server_line
from infra.demo.application import free_port
from infra.ready import wait_until_ready
from serve_app.engine.vllm.options import VllmSettings

NUM_ADAPTERS = 16
COUNTED = ("router", "proxy", "replica", "API")


@dataclass(frozen=True)
class Row:
    """``engine``: free, vllm, or None for vLLM's own server."""

    name: str
    proxy: str = ""
    engine: str | None = None
    routers: int = 1


ROWS = {
    row.name: row
    for row in (
        Row("vllm-server"),
        Row("python", "python", "free"),
        Row("haproxy", "haproxy", "free"),
        Row("haproxy-2", "haproxy", "free", 2),
        Row("python-vllm", "python", "vllm"),
        Row("haproxy-vllm", "haproxy", "vllm"),
    )
}


def write_tiny_base(base: Path, target: Path) -> None:
    """One layer of random weights with ``base``'s tokenizer: an engine that costs little."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 1, 64, 64
    config.num_attention_heads = config.num_key_value_heads = 1
    config.head_dim = 64
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)


@contextlib.contextmanager
def running(row: Row, base: Path, bundle: Bundle, step_s: float) -> Iterator[tuple[int, int, list[str]]]:
    """The server's process, its port, and the models to ask for."""
    port = free_port()
    if row.engine is None:
        line, models = vllm_server_line(base, VllmSettings(num_threads=1, max_batch=64), port), ["base"]
    else:
        line = [sys.executable, "-m", "infra.bench.http.stack", "--proxy", row.proxy, "--engine", row.engine]
        line += ["--routers", str(row.routers), "--base", str(base), "--bundle", bundle.address]
        line += ["--port", str(port), "--streams", "64"]
        models = sorted(bundle.manifest.adapters)
    environment = os.environ | {STEP_SETTING: str(step_s)}
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=sys.stderr, env=environment)
    try:
        path = "health" if row.engine is None else "ready?all=1"
        wait_until_ready(f"http://127.0.0.1:{port}/{path}", START_TIMEOUT_S, lambda: process.poll() is None)
        yield process.pid, port, models
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if row.engine is None:
            process.terminate()
        process.wait()


def measure(row: Row, base: Path, bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    with running(row, base, bundle, args.step_ms / 1000) as (pid, port, models):
        url = f"http://127.0.0.1:{port}/v1/completions"

        def spend(
            clients: int, requests: int, tokens: int, stream: bool, choices: int = 1
        ) -> tuple[load.Run, Counter[str]]:
            before = processes.cpu_seconds(pid)
            run = asyncio.run(load.drive(url, models, clients, requests, tokens, stream, choices))
            after = processes.cpu_seconds(pid)
            return run, Counter({kind: after[kind] - before[kind] for kind in after})

        spend(8, 64, 8, True)  # connections, caches
        result: dict[str, Any] = {"row": row.name, "streamed": {}, "whole": {}}
        for clients in (1, 8, 64):
            requests = max(4, clients * args.repeats)
            run, spent = spend(clients, requests, args.tokens, True)
            result["streamed"][clients] = told(run, spent, requests * args.tokens)
        # All choices of a request have a token at each step, in one message: what one a step would cost all streams.
        run, spent = spend(1, 2 * args.repeats, args.tokens, True, 64)
        result["streamed"]["1 of 64 choices"] = told(run, spent, 2 * args.repeats * args.tokens * 64)
        for clients in (1, 64):
            requests = 40 * args.repeats if clients == 1 else 300 * args.repeats
            run, spent = spend(clients, requests, 1, False)
            result["whole"][clients] = told(run, spent, requests)
        if args.memory_requests:
            before = processes.resident_bytes(pid)
            spend(64, args.memory_requests, 1, False)
            after = processes.resident_bytes(pid)
            result["memory_mib"] = {kind: [before[kind] >> 20, after[kind] >> 20] for kind in sorted(after)}
        return result


def told(run: load.Run, spent: Counter[str], units: int) -> dict[str, Any]:
    """CPU microseconds a unit by process, all together as ``all``."""
    each = {kind: round(1e6 * seconds / units, 1) for kind, seconds in spent.items() if seconds}
    return {
        "cpu_us": dict(sorted(each.items())),
        "all": round(sum(each.get(kind, 0.0) for kind in COUNTED), 1),
        "per_s": round(units / run.seconds),
        "events": round(run.events / units, 2),
        "first_ms": round(1e3 * statistics.median(run.first_s), 1),
    }


def print_row(result: dict[str, Any]) -> None:
    for kind in ("streamed", "whole"):
        for clients, figures in result[kind].items():
            parts = ", ".join(f"{name} {us:.0f}" for name, us in figures["cpu_us"].items())
            unit = "token" if kind == "streamed" else "answer"
            print(
                f"{result['row']:<13} {kind:<8} {clients:>15} clients: {figures['all']:>6.0f} us a {unit} ({parts}); "
                f"{figures['per_s']} {unit}s/s, first after {figures['first_ms']} ms, {figures['events']} events",
                flush=True,
            )
    for kind, (before, after) in result.get("memory_mib", {}).items():
        print(f"{result['row']:<13} memory   {kind}: {before} MiB before, {after} after", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("build/base"), help="whose tokenizer is taken")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=4, help="requests a client")
    parser.add_argument("--tokens", type=int, default=50, help="of a streamed answer")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the free engine")
    parser.add_argument("--memory-requests", type=int, default=0, help="before and after which memory is told")
    parser.add_argument("--out", type=Path, help="the result as a file too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        write_tiny_base(args.base, base)
        bundle = write_bundle(
            str(Path(folder, "out")), read_base(str(base)), lambda s, m: write_cores(s, m, NUM_ADAPTERS)
        )
        results = []
        for name in args.rows:
            results.append(measure(ROWS[name], base, bundle, args))
            print_row(results[-1])
    document = {
        "machine": f"{platform.machine()}, {processes.num_cpus()} CPUs, Python {platform.python_version()}",
        "step_ms": args.step_ms,
        "tokens": args.tokens,
        "rows": results,
    }
    line = json.dumps(document)
    if args.out:
        args.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
