"""Many adapters through plan, run, add and show: seconds, CPU seconds and memory.

    python -m infra.bench.many --adapters 1000 10000

Adapters are made by collection.py: a 7B's q, k and v at ``--layers`` layers, of rank ``--rank``. The commands run as
people run them. CPU seconds are of the command and all processes below it; memory is the largest resident size of the
command's own process, and of a Ray worker, what it shares with others included: both are looked at four times a second.
A collection is removed when it has been measured. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from infra.bench.collection import Collection, write

_TICKS = os.sysconf("SC_CLK_TCK")
_PERIOD_S = 0.25
_PHASES = ("cluster", "fit", "assemble")


@dataclass
class Spent:
    """``phases``, ``cpu_phases``: of ``run``, seconds and CPU seconds by phase."""

    seconds: float
    cpu_seconds: float
    driver_bytes: int
    task_bytes: int
    cpu_phases: dict[str, float]
    phases: dict[str, float] = field(default_factory=dict)


def measure(folder: Path, *line: str) -> Spent:
    """Runs ``python -m compress_jobs`` with this line. A phase has begun when the job first says so."""
    log = (folder / f"{line[0]}.log").open("w")
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "compress_jobs", *line], stdout=log, stderr=log)
    cpu: dict[int, float] = {}
    driver = task = 0
    at: dict[str, float] = {}
    while process.poll() is None:
        for pid in _below(process.pid):
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                resident = int(stat[21]) * os.sysconf("SC_PAGE_SIZE")
            except (OSError, IndexError):
                continue  # it has ended
            cpu[pid] = (int(stat[11]) + int(stat[12])) / _TICKS
            if pid == process.pid:
                driver = max(driver, resident)
            elif title.startswith(b"ray::"):
                task = max(task, resident)
        for said in {
            text.split(":")[0].split()[0] for text in (folder / f"{line[0]}.log").read_text().splitlines() if text
        }:
            at.setdefault(said, sum(cpu.values()))
        time.sleep(_PERIOD_S)
    seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(f"{' '.join(line)}: exit status {process.returncode}; see {folder}/{line[0]}.log")
    begun = {phase: at[phase] for phase in _PHASES if phase in at}
    ends = [*begun.values(), sum(cpu.values())][1:]
    cpu_phases = {phase: round(end - begun[phase], 1) for phase, end in zip(begun, ends, strict=True)}
    return Spent(seconds, sum(cpu.values()), driver, task, cpu_phases)


def _below(pid: int) -> list[int]:
    found = [pid]
    for number in found:
        for children in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def measure_all(adapters: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-many-", dir=options.folder) as temporary:
        root = Path(temporary)
        spec = Collection(adapters, options.layers, options.hidden, options.kv_width, options.rank)
        write(spec, root / "in")
        source = ["--adapters", str(root / "in/adapters"), "--base", str(root / "in/base")]
        cpus = ["--num-cpus", str(options.num_cpus)]
        sizes = ["--clusters", str(options.clusters), "--rank", str(options.basis_rank), "--gate", "1"]
        found = {"plan": measure(root, "plan", *source, *cpus, *sizes, "--device-memory", "80GiB")}
        memory = ["--task-memory", options.task_memory] if options.task_memory else []
        found["run"] = measure(root, "run", *source, *cpus, *sizes, *memory, "--out", str(root / "out"))
        report = json.loads(next((root / "out").rglob("report.json")).read_text())
        found["run"].phases = {name: round(seconds, 1) for name, seconds in report["seconds"].items()}
        last = f"adapter-{adapters - 1:04}"
        shutil.copytree(root / "in/adapters" / last, root / "in/adapters/another")
        found["add"] = measure(root, "add", str(root / "out"), *source, "--adapter", "another")
        found["show"] = measure(root, "show", str(root / "out"))
        bundle = sum(path.stat().st_size for path in (root / "out/objects").iterdir())
        manifest = max(path.stat().st_size for path in (root / "out").rglob("manifest.json"))
        read = sum(path.stat().st_size for path in (root / "in/adapters").rglob("*.safetensors"))
    for command, spent in found.items():
        print(
            f"{adapters:>7} {command:<5} {spent.seconds:8.1f} s {spent.cpu_seconds:8.1f} CPU-s  driver "
            f"{spent.driver_bytes >> 20:5} MiB  task {spent.task_bytes >> 20:5} MiB  {spent.phases or ''} "
            f"CPU-s {spent.cpu_phases or ''}",
            flush=True,
        )
    figures = {"error": report["served"]["mean"], "random_split": report["random_split"]["mean"]}
    sizes_of = {"adapters_bytes": read, "objects_bytes": bundle, "manifest_bytes": manifest}
    return {"adapters": adapters, **{name: asdict(spent) for name, spent in found.items()}, **figures, **sizes_of}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.many", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[1000, 10_000], metavar="N")
    parser.add_argument("--layers", type=int, default=1, help="of the 32 of a 7B (default: 1)")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--kv-width", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (default: 8)")
    parser.add_argument("--clusters", type=int, default=25)
    parser.add_argument("--basis-rank", type=int, default=16)
    parser.add_argument("--task-memory", default="", help="as of run")
    parser.add_argument("--num-cpus", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the collection is made (default: the system's)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}")
    results = [measure_all(adapters, options) for adapters in options.adapters]
    chosen = {name: str(value) for name, value in vars(options).items() if name != "adapters"}
    print(json.dumps({**chosen, "load": os.getloadavg(), "results": results}))


if __name__ == "__main__":
    main()
