"""Speed of compression: a layer by phase, against the machine's own matrix products, and against other compressors.

    python -m infra.bench.compress                                   # a few minutes
    python -m infra.bench.compress --adapters 64 256 1000 --job 64 256 1000
    python -m infra.bench.compress --authors ~/LoRALoLA              # a checkout of the paper's authors' first code
    python -m infra.bench.compress --packages /tmp/others            # pip install --no-deps --target /tmp/others ...

Inputs come from collection.py (Mistral-7B's q/k/v; its choices are printed). One thread. Times are CPU seconds of
this process, not wall time: the same on an idle machine, and others on the machine disturb them less. Everything
that is compared is repeated in turn within one run; medians, with the least and the largest in brackets.

The iteration's share of the product rate: the products with all factors, or with all truncated ones (where it begins),
that jd_full sends to torch are counted by shape; then they alone are timed, each in the layout that is fastest for it,
in turn with jd_full. share = their time / the time of jd_full: truncating, its start, orthonormalising, small products
and stopping all count against it.
Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.adapters.factors import Factors
from cluster.compression import jd_full as jd
from cluster.compression.basis import Basis, relative_errors, unit_cores
from cluster.compression.jd_full import jd_full, leading
from cluster.compression.stack import FactorStack, stack_factors
from infra.bench import baselines
from infra.bench.collection import Collection, factors, write
from infra.bench.products import BareProducts, ProductLog, cpu_seconds

Q_PROJ, K_PROJ = (f"model.layers.0.self_attn.{kind}" for kind in ("q_proj", "k_proj"))


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _cores_and_errors(stack: FactorStack, basis: Basis) -> Tensor:
    return relative_errors(stack, basis, unit_cores(stack, basis))


def measure_module(pairs: list[tuple[int, Factors]], ranks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Phases of one module at each rank: seconds by repeat, operations, share of the product rate, error."""
    stack = stack_factors(pairs)
    assert stack is not None
    stacking = [cpu_seconds(partial(stack_factors, pairs))[0] for _ in range(repeats)]
    rows = []
    for rank in ranks:
        stacks = [stack, *([small] if (small := leading(stack, rank)) is not None else [])]
        with ProductLog({rows.numel() for own in stacks for rows in (own.A, own.B)}) as log:
            basis = jd_full(stack, rank, 0)
        bare = BareProducts(log)
        fits, bares, finals = [], [], []
        for _ in range(repeats):
            fits.append(cpu_seconds(partial(jd_full, stack, rank, 0))[0])
            bares.append(bare.seconds())
            seconds, errors = cpu_seconds(partial(_cores_and_errors, stack, basis))
            finals.append(seconds)
        rows.append({
            "n": len(pairs), "d_out": stack.B.shape[1], "d_in": stack.A.shape[1], "rank": rank,
            "stack_s": median(stacking), "fit_s": median(fits), "cores_s": median(finals),
            "large_products": sum(log.large.values()), "operations": log.operations,
            "large_share_of_operations": log.large_operations / log.operations,
            "product_gflops": log.large_operations / median(bares) / 1e9,
            "fit_gflops": log.large_operations / median(fits) / 1e9,
            "share": [b / f for b, f in zip(bares, fits, strict=True)], "error": float(errors.mean()),
        })  # fmt: skip
    return rows


def compare(
    pairs: list[tuple[int, Factors]], rank: int, repeats: int, make: Callable[[FactorStack, int], baselines.Baseline]
) -> dict[str, Any]:
    """Ours from the raw factors to the cores, the other from normalised ones: what we do more counts against us.

    ``equal_error``: the same with ours stopped at the first iteration that is no worse than the other (None: never).
    """

    def ours() -> None:
        stack = stack_factors(pairs)
        assert stack is not None
        unit_cores(stack, jd_full(stack, rank, 0))

    stack = stack_factors(pairs)
    assert stack is not None
    baseline = make(stack, rank)
    result = baseline.run()
    their_error = baseline.error(result)
    iterations = _iterations_to(stack, rank, their_error)
    own, stopped, theirs = [], [], []
    for _ in range(repeats):
        own.append(cpu_seconds(ours)[0])
        theirs.append(cpu_seconds(baseline.run)[0])
        if iterations is not None:
            with _at_most(iterations):
                stopped.append(cpu_seconds(ours)[0])
    return {
        "n": len(pairs), "rank": rank, "seconds": median(own), "their_seconds": median(theirs),
        "times_faster": [t / o for o, t in zip(own, theirs, strict=True)],
        "error": float(_cores_and_errors(stack, jd_full(stack, rank, 0)).mean()), "their_error": their_error,
        "equal_error": {
            "iterations": iterations, "times_faster": [t / o for o, t in zip(stopped, theirs, strict=True)],
        } if stopped else None,
        "numbers": baselines.joint_numbers(stack, rank), "their_numbers": baseline.num_stored,
    }  # fmt: skip


@contextmanager
def _at_most(iterations: int) -> Iterator[None]:
    usual = jd.MAX_ITERATIONS
    jd.MAX_ITERATIONS = iterations
    try:
        yield
    finally:
        jd.MAX_ITERATIONS = usual


def _iterations_to(stack: FactorStack, rank: int, error: float) -> int | None:
    for iterations in range(1, jd.MAX_ITERATIONS + 1):
        with _at_most(iterations):
            basis = jd_full(stack, rank, 0)
        if float(_cores_and_errors(stack, basis).mean()) <= error:
            return iterations
    return None


def run_job(spec: Collection, clusters: int, rank: int) -> dict[str, Any]:
    """The whole job as a user runs it, on one CPU; what its report says, and the wall seconds of the command."""
    with tempfile.TemporaryDirectory(prefix="bench-compress-") as temporary:
        root = Path(temporary) / "collection"
        write(spec, root)
        line = [sys.executable, "-m", "compress_jobs", "run", "--num-cpus", "1", "--gate", "1"]
        line += ["--adapters", str(root / "adapters"), "--base", str(root / "base"), "--out", str(root / "out")]
        started = time.perf_counter()
        done = subprocess.run([*line, "--clusters", str(clusters), "--rank", str(rank)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"infra.bench.compress: the job failed\n{done.stderr[-2000:]}")
        seconds = time.perf_counter() - started
        report = json.loads(next((root / "out").rglob("report.json")).read_text())
    kept = {key: report.get(key) for key in ("seconds", "bytes_read", "peak_task_memory_bytes", "served")}
    return {"n": spec.adapters, "layers": spec.layers, "clusters": clusters, "rank": rank, "wall_s": seconds, **kept}


def _factors(spec: Collection, module: str) -> list[tuple[int, Factors]]:
    """As they are read: rounded to bfloat16."""
    pairs = [factors(spec, index, module) for index in range(spec.adapters)]
    return [(i, (A.bfloat16().float(), B.bfloat16().float())) for i, (A, B) in enumerate(pairs)]


def _print_header() -> None:
    print(
        "\nGop: all products of the fit, and which part of them has all factors, whole or truncated; "
        "GF/s: these alone, and in the fit"
    )
    print(
        "   n      d_out x d_in  rank  stack s   fit s  cores s    Gop    GF/s: alone   in fit  share             error"
    )


def _print_layer(row: dict[str, Any]) -> None:
    print(
        f"{row['n']:4} {row['d_out']:10} x {row['d_in']:5} {row['rank']:4} "
        f"{row['stack_s']:9.3f} {row['fit_s']:7.3f} {row['cores_s']:8.3f} "
        f"{row['operations'] / 1e9:6.1f} {row['large_share_of_operations']:4.0%}"
        f" {row['product_gflops']:13.1f} {row['fit_gflops']:10.1f}  {spread(row['share']):18} {row['error']:.4f}",
        flush=True,
    )


def _extrapolated(rows: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of 32 layers of q, k and v in one cluster, by n and rank: v taken as k, every layer as this one."""
    totals: dict[str, float] = {}
    for row in rows:
        name = f"{row['n']} r{row['rank']}"
        modules = 1 if row["d_out"] == row["d_in"] else 2
        totals[name] = totals.get(name, 0) + 32 * modules * (row["stack_s"] + row["fit_s"] + row["cores_s"])
    return {name: round(total, 1) for name, total in totals.items()}


def _growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Exponents of n in a phase's seconds between the smallest and the largest collection: 1 is linear."""
    exponents = {}
    for row in rows:
        first = next(other for other in rows if (other["d_out"], other["rank"]) == (row["d_out"], row["rank"]))
        if row["n"] > first["n"]:
            scale = math.log(row["n"] / first["n"])
            per_product = [r["fit_s"] / r["large_products"] for r in (first, row)]
            for phase, ratio in {
                "stack": row["stack_s"] / first["stack_s"],
                "product of the fit": per_product[1] / per_product[0],
                "cores": row["cores_s"] / first["cores_s"],
            }.items():
                name = f"{phase}, d_out {row['d_out']}, r {row['rank']}, {first['n']} to {row['n']}"
                exponents[name] = round(math.log(ratio) / scale, 2)
    return exponents


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.compress", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers: dict[str, Any] = {"type": int, "nargs": "*", "metavar": "N"}
    parser.add_argument("--adapters", default=[64, 256], help="sizes of the collection (default: 64 256)", **numbers)
    parser.add_argument("--ranks", default=[16, 64], help="ranks of the basis (default: 16 64)", **numbers)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of what is timed (default: 5)")
    parser.add_argument("--job", default=[64], help="sizes for the whole job, 2 layers (default: 64)", **numbers)
    parser.add_argument("--authors", type=Path, metavar="PATH", help="checkout of bruel-gabrielsson/LoRALoLA")
    parser.add_argument("--packages", type=Path, metavar="PATH", help="folder with lorashare and vlora-dev")
    parser.add_argument(
        "--compare", default=[64], help="sizes for the comparisons, q_proj only (default: 64)", **numbers
    )
    parser.add_argument("--compare-repeats", type=int, default=3, metavar="N", help="pairs timed (default: 3)")
    parser.add_argument("--eigenvalue", action="store_true", help="also the authors' eigenvalue iteration (slow)")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    torch.set_num_threads(1)
    print(f"{_processor()}, {os.cpu_count()} CPUs, torch {torch.__version__}, 1 thread, load {os.getloadavg()[0]:.1f}")
    spec = Collection(adapters=max([*options.adapters, *options.compare, 1]), layers=1)
    print(f"collection {json.dumps(asdict(spec))}; a smaller one is its beginning")

    rows: list[dict[str, Any]] = []
    if options.adapters:
        _print_header()
    for n in options.adapters:
        for module in (Q_PROJ, K_PROJ):
            pairs = _factors(replace(spec, adapters=n), module)
            found = measure_module(pairs, options.ranks, options.repeats)
            for row in found:
                _print_layer(row)
            rows += found
    growth = _growth(rows)
    for name, exponent in growth.items():
        print(f"seconds grow as n^{exponent:.2f}: {name}")
    totals = _extrapolated(rows)
    if totals:
        print(f"extrapolated, not measured: CPU s for 32 layers of q, k, v (v as k, every layer as this): {totals}")

    others: dict[str, Callable[[FactorStack, int], baselines.Baseline]] = {}
    if options.authors:
        others["authors, alternating"] = partial(baselines.authors_alternating, options.authors)
    if options.authors and options.eigenvalue:
        others["authors, eigenvalue"] = partial(baselines.authors_eigenvalue, options.authors)
    if options.packages:
        sys.path.append(str(options.packages))
        others |= {"lorashare": baselines.lorashare, "vlora-dev": baselines.vlora}
    comparisons = []
    if others:
        print(
            "\nnumbers: how many are kept for all adapters; k: with so many iterations ours is at their error already"
        )
        print(
            "   n rank  other                     s: ours    other  times faster           error: ours, other   numbers"
        )
    for n in options.compare if others else []:
        pairs = _factors(replace(spec, adapters=n), Q_PROJ)
        for rank in options.ranks:
            for name, make in others.items():
                row = {"other": name, **compare(pairs, rank, options.compare_repeats, make)}
                comparisons.append(row)
                equal = row["equal_error"]
                print(
                    f"{n:4} {rank:4}  {name:22} {row['seconds']:9.2f} {row['their_seconds']:8.2f}  "
                    f"{spread(row['times_faster'], 1):22} {row['error']:9.4f} {row['their_error']:9.4f} "
                    f"{row['numbers']:10,} {row['their_numbers']:10,}"
                    + (f"; k = {equal['iterations']}: {spread(equal['times_faster'], 1)}" if equal else ""),
                    flush=True,
                )

    jobs = []
    for n in options.job:
        # The paper's 25 clusters for a thousand adapters.
        jobs.append(run_job(replace(spec, adapters=n, layers=2), clusters=max(1, n // 40), rank=16))
        print(f"\njob {json.dumps(jobs[-1])}", flush=True)
    print()
    print(json.dumps({"layers": rows, "growth": growth, "extrapolated_s": totals, "others": comparisons, "jobs": jobs}))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
