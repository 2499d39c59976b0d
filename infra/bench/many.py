"""Many adapters through plan, run, add and show: seconds, CPU seconds, memory and requests to the store.

    python -m infra.bench.many --adapters 1000 10000
    python -m infra.bench.many --adapters 1000 10000 --store s3://bench/many --metrics http://127.0.0.1:12406/metrics

Adapters are made by collection.py: a 7B's q, k and v at ``--layers`` layers, of rank ``--rank``. The commands run as
people run them. CPU seconds are of the command and all processes below it; memory is the largest resident size of the
command's own process, and of a Ray worker, what it shares with others included: both are looked at four times a second.
Requests are those that the S3 server counted, by kind, and the bytes it sent: ``--metrics`` is SeaweedFS's page
(``weed mini -bucket=bench -metricsPort=12406``). What is under ``--store`` is removed when it has been measured. Last
line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cluster.store.address import open_store
from cluster.store.protocol import Store
from infra.bench.collection import Collection, write

_TICKS = os.sysconf("SC_CLK_TCK")
_PERIOD_S = 0.25
_PHASES = ("cluster", "fit", "assemble")
_THREADS = 8  # that put the collection there, and remove it

Requests = dict[str, int]
"""Kind -> how many there have been; "bytes" -> sent."""


@dataclass
class Spent:
    """``phases``, ``cpu_phases``, ``request_phases``: of ``run``, by phase."""

    seconds: float
    cpu_seconds: float
    driver_bytes: int
    task_bytes: int
    requests: Requests
    cpu_phases: dict[str, float]
    request_phases: dict[str, Requests]
    phases: dict[str, float] = field(default_factory=dict)


def measure(folder: Path, count: Callable[[], Requests], *line: str) -> Spent:
    """Runs ``python -m compress_jobs`` with this line. A phase has begun when the job first says so."""
    log = (folder / f"{line[0]}.log").open("w")
    before = count()
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "compress_jobs", *line], stdout=log, stderr=log)
    cpu: dict[int, float] = {}
    driver = task = 0
    at: dict[str, tuple[float, Requests]] = {}
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
            if said in _PHASES and said not in at:
                at[said] = sum(cpu.values()), count()
        time.sleep(_PERIOD_S)
    seconds = time.monotonic() - began
    if process.returncode:
        sys.exit(f"{' '.join(line)}: exit status {process.returncode}; see {folder}/{line[0]}.log")
    after = count()
    ends = [*at.values(), (sum(cpu.values()), after)][1:]
    return Spent(
        seconds,
        sum(cpu.values()),
        driver,
        task,
        _between(before, after),
        {phase: round(end[0] - at[phase][0], 1) for phase, end in zip(at, ends, strict=True)},
        {phase: _between(at[phase][1], end[1]) for phase, end in zip(at, ends, strict=True)},
    )


def counter(metrics: str, bucket: str) -> Callable[[], Requests]:
    """What the page ``metrics`` has counted in this bucket; without a page nothing."""

    def count() -> Requests:
        if not metrics:
            return {}
        return read_counters(urllib.request.urlopen(metrics, timeout=30).read().decode(), bucket)

    return count


def read_counters(page: str, bucket: str) -> Requests:
    found: Requests = {}
    for kind, number in re.findall(rf's3_request_total{{bucket="{bucket}",code="\d+",type="(\w+)"}} (\S+)', page):
        found[kind] = found.get(kind, 0) + int(float(number))
    sent = re.search(rf's3_bucket_traffic_sent_bytes_total{{bucket="{bucket}"}} (\S+)', page)
    return found | {"bytes": int(float(sent[1])) if sent else 0}


def _between(before: Requests, after: Requests) -> Requests:
    return {kind: number - before.get(kind, 0) for kind, number in after.items() if number != before.get(kind, 0)}


def _below(pid: int) -> list[int]:
    found = [pid]
    for number in found:
        for children in Path(f"/proc/{number}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def put(folder: Path, store: Store, under: str) -> None:
    """Every file below ``folder``."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda path: store.write(f"{under}/{path.relative_to(folder)}", path.read_bytes()), files))


def remove(store: Store) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda entry: store.delete(entry.key), store.list()))


def measure_all(adapters: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-many-", dir=options.folder) as temporary:
        root = Path(temporary)
        address = options.store.rstrip("/") or str(root / "store")
        store = open_store(address)
        if options.store and (there := next(store.list(), None)):  # for what is there is removed at the end
            sys.exit(f"--store {address} holds {there.key} already; give a prefix that holds nothing")
        spec = Collection(adapters, options.layers, options.hidden, options.kv_width, options.rank)
        write(replace(spec, adapters=adapters + 1), root / "in")
        newcomer = (root / f"in/adapters/adapter-{adapters:04}").rename(root / "newcomer")
        put(root / "in", store, "in")
        try:
            found = measure_commands(root, address, newcomer, options)
            return {"adapters": adapters, **found}
        finally:
            remove(store)


def measure_commands(root: Path, address: str, newcomer: Path, options: argparse.Namespace) -> dict[str, Any]:
    store = open_store(address)
    count = counter(options.metrics, address.removeprefix("s3://").partition("/")[0])
    source = ["--adapters", f"{address}/in/adapters", "--base", f"{address}/in/base"]
    cpus = ["--num-cpus", str(options.num_cpus)]
    out = f"{address}/out"
    sizes = ["--clusters", str(options.clusters), "--rank", str(options.basis_rank), "--gate", "1"]
    memory = ["--task-memory", options.task_memory] if options.task_memory else []
    found = {"plan": measure(root, count, "plan", *source, *cpus, *sizes, "--device-memory", "80GiB")}
    found["run"] = measure(root, count, "run", *source, *cpus, *sizes, *memory, "--out", out)
    written = list(store.list("out/"))
    report = json.loads(store.read(next(entry.key for entry in written if entry.key.endswith("/report.json"))).data)
    found["run"].phases = {name: round(seconds, 1) for name, seconds in report["seconds"].items()}
    put(newcomer, store, "in/adapters/newcomer")
    found["add"] = measure(root, count, "add", out, *source, "--adapter", "newcomer")
    found["show"] = measure(root, count, "show", out)
    for command, spent in found.items():
        print(
            f"{command:<5} {spent.seconds:8.1f} s {spent.cpu_seconds:8.1f} CPU-s  driver "
            f"{spent.driver_bytes >> 20:5} MiB  task {spent.task_bytes >> 20:5} MiB  {spent.phases or ''} "
            f"CPU-s {spent.cpu_phases or ''}  requests {spent.requests or ''} {spent.request_phases or ''}",
            flush=True,
        )
    return {
        **{name: asdict(spent) for name, spent in found.items()},
        "error": report["served"]["mean"],
        "random_split": report["random_split"]["mean"],
        "adapters_bytes": sum(e.size_bytes for e in store.list("in/adapters/") if e.key.endswith(".safetensors")),
        "objects_bytes": sum(entry.size_bytes for entry in written if entry.key.startswith("out/objects/")),
        "manifest_bytes": max(entry.size_bytes for entry in written if entry.key.endswith("/manifest.json")),
    }


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
    parser.add_argument("--store", default="", help="s3://bucket/prefix the commands work on (default: that folder)")
    parser.add_argument("--metrics", default="", help="the S3 server's page of counters, with --store")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, torch {torch.__version__}")
    results = [measure_all(adapters, options) for adapters in options.adapters]
    chosen = {name: str(value) for name, value in vars(options).items() if name != "adapters"}
    print(json.dumps({**chosen, "load": os.getloadavg(), "results": results}))


if __name__ == "__main__":
    main()
