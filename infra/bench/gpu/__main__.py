"""Everything that this project does on a GPU, checked and timed in one command of at most ten minutes.

    python -m infra.bench.gpu --out gpu.json                # on a machine with a GPU
    python -m infra.bench.gpu --out cpu.json --small        # tiny and on the CPU: does the script run?

Needs torch with Triton, transformers, peft, safetensors and pytest: no Ray, no vLLM, no S3, no network. The parts:

    compression   JD-Full, JD-Diag and SVD there and on the CPU: seconds, errors, share of the rate of the products
    kernels       tests/serve_app/engine/vllm/test_triton_kernel.py: the Triton kernels against a loop in float64
    layer         infra.bench.layer: one adapted layer, and the kernels' share of the time that memory alone would take
    exactness     both exactness tests of the transformers engine: alone and in a mixed batch, token for token PEFT's
    training      500 adapters of the training recipe, many in a batch

Each is a process with a time limit of its own. What fails or is cut off is said, and stops none of the others; --out is
written after each of them, and is what to keep in infra/bench/results. The exit status is 1 where one failed.
exactness needs the base's weights in build/base; training takes random weights where there is only a config.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_PYTEST = ("pytest", "-q", "--noconftest")
_KERNELS = "tests/serve_app/engine/vllm/test_triton_kernel.py"
_ENGINE = "tests/serve_app/engine/transformers/test_engine.py"
_EXACT = ("test_every_adapter_alone_answers_as_peft_does", "test_a_mixed_batch_joined_at_different_times")

Parts = dict[str, tuple[int, tuple[str, ...]]]
"""Name -> seconds at most, and the module with its arguments."""


def parts(small: bool) -> Parts:
    fixtures = ("-p", "tests.support.models", "-p", "tests.serve_app.engine.conftest")
    exactness = (*_PYTEST, *fixtures, _ENGINE, "-k", " or ".join(_EXACT))
    if small:
        layer = ("--d", "64", "--ranks", "8", "--tokens", "4", "--repeats", "1")
        return {
            "compression": (300, ("infra.bench.gpu.compression", "--adapters", "12", "--ranks", "4", "--hidden", "64")),
            "kernels": (300, (*_PYTEST, _KERNELS)),
            "layer": (300, ("infra.bench.layer", *layer)),
            "exactness": (600, exactness),
            "training": (600, ("infra.bench.gpu.training", "--adapters", "2", "--together", "2", "--steps", "2")),
        }
    return {
        "compression": (140, ("infra.bench.gpu.compression",)),
        "kernels": (100, (*_PYTEST, _KERNELS)),
        "layer": (70, ("infra.bench.layer", "--device", "cuda")),
        "exactness": (70, exactness),
        "training": (210, ("infra.bench.gpu.training",)),
    }


def run_part(seconds: int, line: Sequence[str]) -> dict[str, Any]:
    """What its last line says: JSON, or how many tests passed. ``failed`` where there is none, and why."""
    began = time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if not torch.cuda.is_available():
        environment["OMP_NUM_THREADS"] = "1"  # tiny products: on a busy machine threads would wait for each other
    try:
        done = subprocess.run(
            [sys.executable, "-m", *line], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired as error:
        return {"failed": f"not done in {seconds} s", "output": _tail(error.stdout) + _tail(error.stderr)}
    took: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and line[0] == "pytest":
        return took | {"tests": last}
    if done.returncode == 0 and last.startswith("{"):
        took.update(json.loads(last))
        return took
    return took | {"failed": f"status {done.returncode}", "output": _tail(done.stdout) + _tail(done.stderr)}


def _tail(output: str | bytes | None) -> str:
    text = output.decode(errors="replace") if isinstance(output, bytes) else output or ""
    return text[-3000:]


def machine() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else None,
        "cpu": platform.machine(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if has_gpu else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--parts", nargs="+", choices=tuple(parts(True)), help="only these (default: all)")
    parser.add_argument("--small", action="store_true", help="tiny sizes, and without a GPU")
    options = parser.parse_args(arguments)
    if not options.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --small runs the same on the CPU, in tiny")
    report: dict[str, Any] = {"machine": machine(), "small": options.small, "parts": {}}
    for name, (seconds, line) in parts(options.small).items():
        if options.parts and name not in options.parts:
            continue
        print(f"{name}: {' '.join(line)}", file=sys.stderr, flush=True)
        report["parts"][name] = result = {"command": " ".join(line), **run_part(seconds, line)}
        print(f"  {result.get('failed', 'done')}, {result.get('seconds', seconds)} s", file=sys.stderr, flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 1 if any("failed" in result for result in report["parts"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
