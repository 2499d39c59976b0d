"""Half an hour of what happens to an application, under load: python -m infra.soak --help

Prints what happens, and last one JSON line: answers, failed, wrong, memory and logs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.bundle.revisions import read_current
from cluster.store.address import open_store
from infra.bench.http.processes import num_cpus
from infra.demo.application import free_port
from infra.process_group import end_group
from infra.ready import wait_until_ready
from infra.seaweed import AMBIENT, BUCKET, run_seaweed
from infra.soak.clients import PROMPTS, Answered, Clients, ask
from infra.soak.watching import Watching, bytes_below, medians

ROOT = Path(__file__).parent.parent.parent
OUT, ADAPTERS = f"s3://{BUCKET}/out", f"s3://{BUCKET}/adapters"
REFRESH_S, OUTAGE_S, IN_FLIGHT_S, START_TIMEOUT_S = 2.0, 60.0, 10.0, 300.0
# HAProxy's own ports are every interface's.
SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "local",
}
ROUTER, REPLICA = "ray::ServeReplica:bench:router", "ray::ServeReplica:bench:group-0"


@dataclass
class Soak:
    """``kills``: when; ``revisions``: those that CURRENT has named; ``told``: when, in seconds, and what happened."""

    base: Path
    zoo: Path
    port: int
    weed: psutil.Process
    server: psutil.Process
    began: float = field(default_factory=time.monotonic)
    kills: list[float] = field(default_factory=list)
    revisions: set[int] = field(default_factory=set)
    told: list[tuple[float, str]] = field(default_factory=list)

    def tell(self, text: str) -> None:
        self.told.append((round(time.monotonic() - self.began, 1), text))
        print(f"{self.told[-1][0]:7.1f} s  {text}", flush=True)

    def update(self, pairs: Mapping[str, str]) -> None:
        """Adapter -> whose weights it gets."""
        for adapter, source in pairs.items():
            upload(self.zoo / source, adapter)
        names = " ".join(f"{adapter} is {source}" for adapter, source in pairs.items())
        line = ("update", OUT, "--adapters", ADAPTERS, "--base", str(self.base), "--adapter", *pairs)
        self._command(f"update: {names}", *line)

    def roll_back(self, to: int) -> None:
        self._command(f"rollback to {to}", "rollback", OUT, "--to", str(to), "--allow-drop", "all")

    def _command(self, name: str, *line: str) -> None:
        began = time.monotonic()
        done = job(*line)
        told = done.stdout.strip().splitlines()
        self.tell(f"{name}: exit {done.returncode} after {time.monotonic() - began:.0f} s; {told[-1] if told else ''}")
        if done.returncode == 0:
            self.await_served()

    def await_served(self) -> None:
        wanted = current_revision()
        wait(lambda: all(served_revision(self.port) == wanted for _ in range(8)))
        self.revisions.add(wanted)
        self.tell(f"revision {wanted} is served")

    def kill(self, name: str) -> None:
        found = [own for own in self.server.children(recursive=True) if name in command_of(own)]
        self.kills.append(time.monotonic())
        found[0].kill()
        self.tell(f"killed {name}, {len(found)} were there")

    def store_outage(self) -> None:
        self.tell("the store stops")
        self.weed.suspend()
        try:
            time.sleep(OUTAGE_S)
        finally:
            self.weed.resume()
            self.tell("the store goes on")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--adapters", type=Path, default=ROOT / "infra/zoo/adapters", help="folders of the base's")
    parser.add_argument("--base", type=Path, default=ROOT / "build/base", help="the base model's folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the JSON document is put, besides being printed")
    args = parser.parse_args()
    for name in AMBIENT:
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, run_seaweed(Path(folder) / "store") as store:
        os.environ |= store.environment()
        [weed] = [own for own in psutil.Process().children() if "weed" in own.name()]
        compress(args.adapters, args.base)
        with serving(Path(folder), args.base) as (port, server, logs):
            soak = Soak(args.base, args.adapters, port, weed, server)
            soak.await_served()
            document = run(soak, sorted(own.name for own in args.adapters.iterdir()), args, logs)
    if args.out:
        args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0 if document["wrong"] == 0 and document["failed"] == 0 else 1


def compress(adapters: Path, base: Path) -> None:
    for own in sorted(adapters.iterdir()):
        upload(own, own.name)
    done = job("run", "--adapters", ADAPTERS, "--base", str(base), "--out", OUT, "--clusters", "2", "--rank", "16")
    if done.returncode:
        sys.exit(f"soak: the job failed: {done.stdout}{done.stderr}")


def upload(folder: Path, name: str) -> None:
    store = open_store(ADAPTERS)
    for path in folder.iterdir():
        store.write(f"{name}/{path.name}", path.read_bytes())


def job(*line: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress_jobs", *line]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@contextlib.contextmanager
def serving(folder: Path, base: Path) -> Iterator[tuple[int, psutil.Process, Path]]:
    """The port, `serve run`'s process, and where Ray logs."""
    port = free_port()
    arguments: dict[str, Any] = {"bundle": OUT, "base": str(base), "engine": "transformers", "device": "cpu"}
    arguments |= {"routers": 2, "refresh_interval_s": REFRESH_S}
    arguments["placement"] = {"clusters_per_group": 4, "replicas": 2, "devices": 2, "num_cpus": 0.5}
    application = {"name": "bench", "route_prefix": "/", "import_path": "serve_app.app:build", "args": arguments}
    document = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(json.dumps(document))  # which is YAML too
    # Short, for there are sockets in it.
    own = Path(tempfile.mkdtemp(prefix="ray-"))
    ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("STATS", "METRICS")}
    line = [str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")]
    environment = os.environ | SETTINGS | ports | {"RAY_TMPDIR": str(own)}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}/ready?all=1"
            wait_until_ready(url, START_TIMEOUT_S, lambda: process.poll() is None)
            yield port, psutil.Process(process.pid), own
        finally:
            end_group(process)
            shutil.rmtree(own, ignore_errors=True)


def run(soak: Soak, models: list[str], args: argparse.Namespace, logs: Path) -> dict[str, Any]:
    seconds = 60 * args.minutes
    a, b, c, d = models[:4]
    # Share of the time -> what happens then.
    plan: list[tuple[float, Callable[[], None]]] = [
        (0.15, partial(soak.update, {a: b, b: a})),
        (0.25, partial(soak.kill, REPLICA)),
        (0.35, soak.store_outage),
        (0.45, partial(soak.update, {c: d})),
        (0.55, partial(soak.roll_back, 0)),
        (0.65, partial(soak.kill, ROUTER)),
        (0.75, partial(soak.update, {a: a, b: b, d: c})),
        (0.85, partial(soak.kill, REPLICA)),
    ]
    soak.began = time.monotonic()
    with Watching(soak.server.pid) as watching, Clients(soak.port, models, args.clients, args.seed) as clients:
        for share, happens in plan:
            time.sleep(max(0.0, soak.began + share * seconds - time.monotonic()))
            happens()
        time.sleep(max(0.0, soak.began + seconds - time.monotonic()))
    took = time.monotonic() - soak.began
    soak.tell(f"the load ends: {clients.num_answers} answers, {len(clients.failed)} failed")
    in_flight = [own for own in clients.failed if any(0 <= own[0] - kill < IN_FLIGHT_S for kill in soak.kills)]
    failed = [own for own in clients.failed if own not in in_flight]
    wrong, unchecked = check(soak, models, clients.answered)
    return {
        "bench": "soak",
        "machine": f"{platform.processor() or platform.machine()}, {num_cpus()} CPUs",
        "torch": torch.__version__,
        "seconds": round(took),
        "clients": args.clients,
        "adapters": len(models),
        "revisions": len(soak.revisions),
        "answers": clients.num_answers,
        "wrong": wrong,
        "unchecked": unchecked,
        "failed": len(failed),
        "failed_in_flight_on_what_was_killed": len(in_flight),
        "failures": sorted({what for _, what in clients.failed})[:10],
        # Before anything was killed, and in the last tenth: after warm-up nothing may grow.
        "mib_from_a_tenth_on": medians(watching.samples, 0.1 * seconds, 0.2 * seconds),
        "mib_at_the_end": medians(watching.samples, 0.9 * seconds, seconds + 1),
        "log_mib": bytes_below(logs) >> 20,
        "happened": soak.told,
    }


def check(soak: Soak, models: list[str], answered: Answered) -> tuple[int, int]:
    """How many answers were others than those that one client gets of the same revision, and how many could not be
    told: their revision is none of those that were seen."""
    alone: dict[tuple[str, str, str], str] = {}
    for revision in sorted(soak.revisions):
        soak.roll_back(revision)
        for model in models:
            for prompt in PROMPTS:
                served, text = ask(soak.port, model, prompt, stream=False)
                alone[served, model, prompt] = text
    wrong = unchecked = 0
    for own, texts in answered.items():
        if own not in alone:
            unchecked += texts.total()
            continue
        wrong += texts.total() - texts[alone[own]]
        if set(texts) != {alone[own]}:
            soak.tell(f"{own}: {dict(texts)}, alone {alone[own]!r}")
    return wrong, unchecked


def current_revision() -> int:
    found = read_current(open_store(OUT))
    assert found is not None
    return found[0].revision


def served_revision(port: int) -> int | None:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=30) as answer:
        number: int | None = json.load(answer)["revision"]["serving"]
        return number


def wait(condition: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"it did not come about in {timeout_s:.0f} s")
        time.sleep(0.2)


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


if __name__ == "__main__":
    sys.exit(main())
