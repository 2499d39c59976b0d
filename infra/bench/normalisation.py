"""Which weight an adapter has in a shared basis: its own at each module, or one over all its modules?

    module     w_im = 1 / ||M_im||^2             what cluster/compression/stack.py does, as the authors' code does
    adapter    w_i  = 1 / sum_m ||M_im||^2       as a re-implementation does

    python -m infra.bench.normalisation [--adapters URI] [--tasks FILE] [--ranks 2,4,8] [--clusters K] [--rows N]

In a stack of unit adapters, the second is the first with each adapter weighted by its share of its own energy at the
module: its factors are scaled by the root of that for fitting, and cores and errors are taken on the unit stack. The
second is nearer to the error we report (energy-weighted), so it is judged by held-out loss. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from cluster.adapters.base import read_base
from cluster.adapters.layout import Layout
from cluster.compression.basis import Basis, unit_cores
from cluster.compression.jd_full import jd_full
from cluster.compression.methods import METHODS, JointMethod
from cluster.compression.stack import FactorStack
from compress_jobs.quality.collection import Adapters, Collection, compress_jointly, read_collection
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.task import Task, read_tasks

REPOSITORY = Path(__file__).parent.parent.parent
ZOO = REPOSITORY / "infra" / "zoo"
BASE = REPOSITORY / "build" / "base"


def by_adapter(collection: Collection) -> JointMethod:
    """JD-Full with w_i = 1 / sum_m ||M_im||^2."""
    energies = torch.zeros(len(collection.adapters), dtype=torch.float64)
    for stack in collection.stacks.values():
        energies[list(stack.members)] += stack.norms.square()

    def fit(stack: FactorStack, rank: int, seed: int) -> Basis:
        shares = stack.norms.square() / energies[list(stack.members)]
        rows = shares.sqrt().float().repeat_interleave(torch.tensor(stack.ranks))
        weighted = replace(stack, B=stack.B * rows.unsqueeze(1), gram_B=stack.gram_B * shares.view(-1, 1, 1))
        return jd_full(weighted, rank, seed)

    return JointMethod(fit, unit_cores)


def losses(scorer: Scorer, tasks: dict[str, Task], adapters: Adapters) -> dict[str, float]:
    """Held-out loss of every adapter that has a task, nats a token."""
    return {i: scorer.score(tasks[i], adapters[i]).loss for i in sorted(set(adapters) & set(tasks))}


def mean(values: dict[str, float]) -> float:
    return math.fsum(values.values()) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", metavar="URI", default=str(ZOO / "adapters"))
    parser.add_argument("--tasks", metavar="FILE", type=Path, default=ZOO / "tasks.jsonl")
    parser.add_argument("--base", metavar="PATH", default=str(BASE))
    parser.add_argument("--ranks", metavar="NUMBERS", default="2,4,8")
    parser.add_argument("--clusters", metavar="K", type=int, default=1)
    parser.add_argument("--rows", metavar="N", type=int, default=16)
    parsed = parser.parse_args()
    collection = read_collection(parsed.adapters, read_base(parsed.base), Layout())
    tasks, scorer = read_tasks(parsed.tasks, parsed.rows), Scorer(parsed.base)
    uncompressed = losses(scorer, tasks, collection.adapters)
    print(
        f"{len(collection.adapters)} adapters, {len(uncompressed)} with a task; uncompressed {mean(uncompressed):.4f}"
    )
    print(f"{'rank':>4} {'weight':<8} {'error mean':>10} {'worst':>7} {'loss mean':>10} {'worst':>7} {'better in':>10}")
    results = []
    for rank in map(int, parsed.ranks.split(",")):
        labels = collection.labels(parsed.clusters, rank, seed=0)
        found = {}
        for weight, method in (("module", METHODS["jd-full"]), ("adapter", by_adapter(collection))):
            compressed = compress_jointly(collection, labels, method, rank, seed=0)
            found[weight] = (compressed.errors, losses(scorer, tasks, compressed.factors))
        for weight, other in (("module", "adapter"), ("adapter", "module")):
            errors, loss = found[weight]
            better = sum(loss[adapter_id] < found[other][1][adapter_id] for adapter_id in loss)
            print(
                f"{rank:>4} {weight:<8} {mean(errors):>10.4f} {max(errors.values()):>7.4f} {mean(loss):>10.4f} "
                f"{max(loss.values()):>7.3f} {f'{better} of {len(loss)}':>10}",
                flush=True,
            )
            results.append(
                {
                    "rank": rank,
                    "weight": weight,
                    "error_mean": round(mean(errors), 5),
                    "error_worst": round(max(errors.values()), 5),
                    "loss_mean": round(mean(loss), 5),
                    "num_better": better,
                }
            )
    print(json.dumps({"clusters": parsed.clusters, "rows": parsed.rows, "results": results}))


if __name__ == "__main__":
    main()
