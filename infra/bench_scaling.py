"""Parallel efficiency of the compute phase: the same collection compressed on one CPU and on two.

    python -m infra.bench_scaling [--repeats 3]

64 adapters of rank 16 on q/k/v of a few layers in Mistral-7B's shapes (4096 x 4096, 1024 x 4096), random, bfloat16,
for a base that exists by its headers only; read from a local folder. The figure is the seconds of the fit (pass 2)
in report.json: reading included, the start of Ray and of its workers not. Each repeat runs both, in turn; the median
of their ratios counts. The run on one CPU is bound to one core, all of it: Ray's daemons, driver and worker; so is the
run on two to two. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_ADAPTERS, NUM_LAYERS, RANK, CLUSTERS = 64, 16, 16, 2
SHAPES = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}  # d_out, d_in
NAME = "bench/base"
MODULES = {
    f"model.layers.{layer}.self_attn.{kind}": shape for layer in range(NUM_LAYERS) for kind, shape in SHAPES.items()
}


def write_base(folder: Path) -> None:
    """Headers over holes: 42 MB a layer that take no place on the disk."""
    folder.mkdir(parents=True)
    header, end = {}, 0
    for module, (d_out, d_in) in MODULES.items():
        size = 2 * d_out * d_in
        header[f"{module}.weight"] = {"dtype": "BF16", "shape": [d_out, d_in], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", "_name_or_path": NAME}))


def write_adapters(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "base_model_name_or_path": NAME, "r": RANK, "lora_alpha": RANK}
    for index in range(NUM_ADAPTERS):
        target = folder / f"adapter-{index:04}"
        target.mkdir(parents=True)
        tensors = {}
        for module, (d_out, d_in) in MODULES.items():
            for factor, shape in (("A", (RANK, d_in)), ("B", (d_out, RANK))):
                tensor = torch.randn(shape, generator=generator).to(torch.bfloat16)
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = tensor
        save_file(tensors, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(SHAPES)}))


def fit_seconds(root: Path, num_cpus: int, cores: list[int]) -> float:
    """Seconds of the fit phase of one run, bound to as many cores as it has CPUs."""
    with tempfile.TemporaryDirectory(dir=root) as out:
        line = [sys.executable, "-m", "compress_jobs", "run", "--num-cpus", str(num_cpus), "--gate", "1"]
        line += ["--clusters", str(CLUSTERS), "--rank", str(RANK), "--out", out]
        line += ["--adapters", str(root / "adapters"), "--base", str(root / "base")]
        subprocess.run(
            line,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, cores[:num_cpus]),
        )
        report = json.loads(next(Path(out).rglob("report.json")).read_text())
        return float(report["seconds"]["fit"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("two cores are needed")
    print(f"{platform.machine()}, {len(cores)} CPUs, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{NUM_ADAPTERS} adapters of rank {RANK}, q/k/v of {NUM_LAYERS} Mistral-7B layers, {CLUSTERS} clusters\n")
    one, two, load = [], [], []
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as temporary:
        root = Path(temporary)
        write_base(root / "base")
        write_adapters(root / "adapters")
        print(f"{'load':>6} {'1 CPU, s':>9} {'2 CPUs, s':>10} {'efficiency':>11}")
        for _ in range(repeats):
            load.append(os.getloadavg()[0])
            one.append(fit_seconds(root, 1, cores))
            two.append(fit_seconds(root, 2, cores))
            print(f"{load[-1]:6.1f} {one[-1]:9.2f} {two[-1]:10.2f} {one[-1] / two[-1] / 2:11.3f}", flush=True)
    efficiency = statistics.median(a / b / 2 for a, b in zip(one, two, strict=True))
    print(
        json.dumps(
            {
                "efficiency": round(efficiency, 3),
                "fit_s_1_cpu": [round(seconds, 2) for seconds in one],
                "fit_s_2_cpus": [round(seconds, 2) for seconds in two],
                "load_before": [round(value, 1) for value in load],
                "adapters": NUM_ADAPTERS,
                "layers": NUM_LAYERS,
                "rank": RANK,
                "clusters": CLUSTERS,
                "shapes": SHAPES,
                "machine": f"{platform.machine()}, {len(cores)} CPUs",
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
