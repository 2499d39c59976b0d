"""Peak memory of a compression task: it grows with the adapters of a layer, not with the number of layers.

    python -m infra.bench_memory

Random adapters (rank 16 on q/k/v, hidden size 1024, bfloat16) for a base that exists by its headers only; the
job runs as a user runs it, on one CPU; the figure is the largest resident size of any worker process, less
that of a worker which has compressed one adapter of one layer (Python, torch and Ray). Last line: JSON.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, RANK = 1024, 16
GRID = [(64, 4), (64, 12), (256, 4), (256, 12)]  # adapters, layers
KINDS = ("q_proj", "k_proj", "v_proj")
NAME = "bench/base"


def modules(num_layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{kind}" for layer in range(num_layers) for kind in KINDS]


def write_base(folder: Path, num_layers: int) -> None:
    folder.mkdir(parents=True)
    weight = torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16)
    save_file({f"{m}.weight": weight.clone() for m in modules(num_layers)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": NAME}))


def write_adapters(folder: Path, num_adapters: int, num_layers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "base_model_name_or_path": NAME, "r": RANK, "lora_alpha": RANK}
    for index in range(num_adapters):
        target = folder / f"adapter-{index:04}"
        target.mkdir(parents=True)
        tensors = {}
        for module in modules(num_layers):
            for factor, shape in (("A", (RANK, HIDDEN)), ("B", (HIDDEN, RANK))):
                tensor = torch.randn(shape, generator=generator).to(torch.bfloat16)
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = tensor
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(KINDS)}))


def peak_bytes(num_adapters: int, num_layers: int) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as temporary:
        root = Path(temporary)
        write_base(root / "base", num_layers)
        write_adapters(root / "adapters", num_adapters, num_layers)
        line = [sys.executable, "-m", "compress_jobs", "run", "--num-cpus", "1", "--gate", "1"]
        for option in ("adapters", "base", "out"):
            line += [f"--{option}", str(root / option)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads(next((root / "out").rglob("report.json")).read_text())
        return int(report["peak_task_memory_bytes"])


def main() -> None:
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"hidden size {HIDDEN}, rank {RANK}, q/k/v; a layer's factors in float32 beside the peak\n")
    floor = peak_bytes(1, 1)
    print(f"{'adapters':>8} {'layers':>6} {'a layer, MiB':>13} {'peak above floor, MiB':>22}")
    peaks = {}
    for num_adapters, num_layers in GRID:
        above = peak_bytes(num_adapters, num_layers) - floor
        peaks[f"{num_adapters}x{num_layers}"] = above
        layer = num_adapters * len(KINDS) * 2 * RANK * HIDDEN * 4
        print(f"{num_adapters:8} {num_layers:6} {layer / 2**20:13.1f} {above / 2**20:22.1f}", flush=True)
    by_layers = peaks["256x12"] / peaks["256x4"]
    by_adapters = peaks["256x4"] / peaks["64x4"]
    print(
        json.dumps(
            {
                "floor_bytes": floor,
                "peak_above_floor_bytes": peaks,
                "times_for_3_times_the_layers": round(by_layers, 2),
                "times_for_4_times_the_adapters": round(by_adapters, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
