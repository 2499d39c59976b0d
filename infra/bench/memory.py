"""Peak memory of a compression task: it grows with the adapters of a layer, not with the number of layers.

    python -m infra.bench.memory

Adapters made by collection.py (rank 16 on q/k/v, hidden size 1024); the job runs as a user runs it, on one CPU;
the figure is the largest resident size of any worker process, less
that of a worker which has compressed one adapter of one layer (Python, torch and Ray). Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from infra.bench.collection import Collection, write

HIDDEN, RANK = 1024, 16
GRID = [(64, 4), (64, 12), (256, 4), (256, 12)]  # adapters, layers


def peak_bytes(num_adapters: int, num_layers: int) -> int:
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as temporary:
        root = Path(temporary)
        write(Collection(num_adapters, num_layers, HIDDEN, kv_width=HIDDEN, rank=RANK), root / "in")
        line = [sys.executable, "-m", "compress_jobs", "run", "--num-cpus", "1", "--gate", "1"]
        line += ["--adapters", str(root / "in/adapters"), "--base", str(root / "in/base"), "--out", str(root / "out")]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        report = json.loads(next((root / "out").rglob("report.json")).read_text())
        return int(report["peak_task_memory_bytes"])


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m infra.bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"hidden size {HIDDEN}, rank {RANK}, q/k/v; a layer's factors in float32 beside the peak\n")
    floor = peak_bytes(1, 1)
    print(f"{'adapters':>8} {'layers':>6} {'a layer, MiB':>13} {'peak above floor, MiB':>22}")
    peaks = {}
    for num_adapters, num_layers in GRID:
        above = peak_bytes(num_adapters, num_layers) - floor
        peaks[f"{num_adapters}x{num_layers}"] = above
        layer = num_adapters * 3 * 2 * RANK * HIDDEN * 4
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
