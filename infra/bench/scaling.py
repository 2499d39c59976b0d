"""Parallel efficiency of the compute phase: the same collection compressed on one CPU and on two.

    python -m infra.bench.scaling [--repeats 3]

64 adapters of rank 16 on q/k/v of a few layers in Mistral-7B's shapes, made by collection.py with its defaults;
read from a local folder. The figure is the seconds of the fit (pass 2)
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
from dataclasses import asdict
from pathlib import Path

import torch

from infra.bench.collection import Collection, write

CLUSTERS = 2
COLLECTION = Collection(adapters=64, layers=16)


def fit_seconds(root: Path, num_cpus: int, cores: list[int]) -> float:
    """Seconds of the fit phase of one run, bound to as many cores as it has CPUs."""
    with tempfile.TemporaryDirectory(dir=root) as out:
        line = [sys.executable, "-m", "compress_jobs", "run", "--num-cpus", str(num_cpus), "--gate", "1"]
        line += ["--clusters", str(CLUSTERS), "--rank", str(COLLECTION.rank), "--out", out]
        line += ["--adapters", str(root / "in/adapters"), "--base", str(root / "in/base")]
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
    print(f"{COLLECTION}, {CLUSTERS} clusters\n")
    one, two, load = [], [], []
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as temporary:
        root = Path(temporary)
        write(COLLECTION, root / "in")
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
                "collection": asdict(COLLECTION),
                "clusters": CLUSTERS,
                "machine": f"{platform.machine()}, {len(cores)} CPUs",
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
