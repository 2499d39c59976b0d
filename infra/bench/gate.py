"""The evidence that a run chooses its gate by: whether the probe orders sizes as held-out loss does, and whether what a
gate was chosen to keep is kept, by all adapters, on rows that it never saw.

    python -m infra.bench.gate [--adapters DIR] [--tasks FILE] [--clusters K --rank R] [--keep 0.99]

First each of a few sizes (SVD of three ranks, JD-Full of four) is judged by both, on eight adapters. Then two whole
jobs choose a gate, one by the first half of every task's rows and one by the probe, and what they serve is asked the
second half. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from cluster.adapters.base import read_base
from cluster.adapters.layout import Layout
from cluster.bundle.export import served_factors
from cluster.bundle.reading import Bundle
from cluster.compression.methods import METHODS
from compress_jobs.job.options import AUTO, RunOptions
from compress_jobs.job.prepare import prepare
from compress_jobs.job.run import run
from compress_jobs.quality.collection import Adapters, Collection, compress_jointly, read_collection, truncate_to_rank
from compress_jobs.quality.probe import Probe
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.task import Task, read_tasks

REPOSITORY = Path(__file__).parent.parent.parent
ZOO = REPOSITORY / "infra" / "zoo"
BASE = REPOSITORY / "build" / "base"
_NUM_ADAPTERS, _NUM_ROWS = 8, 32
_SIZES = ((1, 8), (1, 16), (2, 16), (4, 16))  # clusters and rank


def sizes(collection: Collection) -> dict[str, Adapters]:
    """Name of a size -> every adapter in it."""
    found: dict[str, Adapters] = {
        f"svd, rank {rank}": truncate_to_rank(collection.adapters, rank).factors for rank in (1, 2, 3)
    }
    for k, rank in _SIZES:
        if k <= len(collection.adapters):
            labels = collection.labels(k, rank, seed=0)
            joint = compress_jointly(collection, labels, METHODS["jd-full"], rank, seed=0)
            found[f"jd-full, {k} of rank {rank}"] = joint.factors
    return found


def compare(scorer: Scorer, collection: Collection, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Each size by held-out rows and by the probe: means over the adapters of what is kept, and the order of sizes."""
    asked = [adapter_id for adapter_id in collection.adapters if adapter_id in tasks]
    picked = [asked[i] for i in np.linspace(0, len(asked) - 1, min(_NUM_ADAPTERS, len(asked))).round().astype(int)]
    kept: dict[str, dict[str, list[float]]] = {}
    cpu = {"loss": 0.0, "probe": 0.0}
    every = sizes(collection)
    for number, adapter_id in enumerate(picked):
        own, task = collection.adapters[adapter_id], tasks[adapter_id]
        began = time.process_time()
        base = scorer.score(task, {}).loss
        gained = base - scorer.score(task, own).loss
        left = {name: base - scorer.score(task, served[adapter_id]).loss for name, served in every.items()}
        middle = time.process_time()
        probe = Probe(scorer, own, seed=number)
        by_probe = {name: probe.judge(served[adapter_id])[0] for name, served in every.items()}
        cpu["loss"], cpu["probe"] = cpu["loss"] + middle - began, cpu["probe"] + time.process_time() - middle
        for name in every:
            kept.setdefault(name, {"loss": [], "probe": []})
            kept[name]["loss"].append(min(left[name] / gained, 1.0))
            kept[name]["probe"].append(by_probe[name])
    print(f"what {len(picked)} adapters keep, in the mean")
    print(f"{'size':<24}{'by loss':>14}{'worst':>8}{'by the probe':>14}{'worst':>8}")
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, by in sorted(kept.items(), key=lambda item: sum(item[1]["loss"])):
        rows[name] = {j: {"mean": round(float(np.mean(v)), 4), "worst": round(min(v), 4)} for j, v in by.items()}
        cells = "".join(f"{rows[name][judge]['mean']:>14.3f}{rows[name][judge]['worst']:>8.3f}" for judge in by)
        print(f"{name:<24}{cells}")
    means = [[rows[name][judge]["mean"] for name in rows] for judge in ("loss", "probe")]
    agreement = rank_correlation(*means)
    per_adapter = {judge: round(seconds / len(picked), 1) for judge, seconds in cpu.items()}
    print(f"rank correlation of the sizes' means {agreement:.2f}; CPU seconds an adapter: {per_adapter}", flush=True)
    return {"adapters": picked, "sizes": rows, "rank_correlation": round(agreement, 3), "cpu_seconds": per_adapter}


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's, without ties."""
    places = np.array([np.argsort(np.argsort(values)) for values in (first, second)])
    return float(np.corrcoef(places[0], places[1])[0, 1])


def whole_job(
    options: RunOptions, scorer: Scorer, originals: Adapters, unseen: Mapping[str, Task], how: str
) -> dict[str, Any]:
    """A run that chooses its gate; what every adapter with a task then keeps on rows that the gate never saw."""
    outcome = run(prepare(options))
    bundle, manifest = Bundle.open(options.out), outcome.manifest
    assert outcome.summary is not None
    assert outcome.summary.gate is not None
    kept = {}
    for adapter_id, task in unseen.items():
        if adapter_id not in manifest.adapters:
            continue
        base, own = scorer.score(task, {}).loss, scorer.score(task, originals[adapter_id]).loss
        if base > own:
            kept[adapter_id] = (base - scorer.score(task, served_factors(bundle, adapter_id)).loss) / (base - own)
    worst = min(kept, key=lambda adapter_id: kept[adapter_id])
    modes = [adapter.mode for adapter in manifest.adapters.values()]
    figures = {
        "gate": manifest.method.gate,
        "on_basis": modes.count("core"),
        "truncated": modes.count("truncated"),
        "bytes": manifest.resident_bytes(),
        "kept_mean": round(math.fsum(min(value, 1.0) for value in kept.values()) / len(kept), 4),
        "kept_worst": round(kept[worst], 4),
        "worst": worst,
        "adapters": len(kept),
        "evidence_cpu_seconds": round(outcome.summary.gate["cpu_seconds"], 1),
    }
    print(f"{how}: {figures}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", metavar="DIR", default=str(ZOO / "adapters"))
    parser.add_argument("--tasks", metavar="FILE", type=Path, default=ZOO / "tasks.jsonl")
    parser.add_argument("--base", metavar="PATH", default=str(BASE))
    parser.add_argument("--clusters", metavar="K", type=int, default=2)
    parser.add_argument("--rank", metavar="R", type=int, default=16)
    parser.add_argument("--keep", metavar="S", type=float, default=0.99)
    parser.add_argument("--num-cpus", metavar="N", type=int, default=2)
    parsed = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    collection = read_collection(parsed.adapters, read_base(parsed.base), Layout())
    rows, scorer = read_tasks(parsed.tasks, 2 * _NUM_ROWS), Scorer(parsed.base)
    half = {name: len(task.rows) // 2 for name, task in rows.items()}
    seen = {name: replace(task, rows=task.rows[: half[name]]) for name, task in rows.items()}
    unseen = {name: replace(task, rows=task.rows[half[name] :]) for name, task in rows.items()}
    num_asked = len(collection.adapters.keys() & rows.keys())
    print(f"{len(collection.adapters)} adapters, {num_asked} with a task", flush=True)
    results: dict[str, Any] = {"adapters": len(collection.adapters), "clusters": parsed.clusters, "rank": parsed.rank}
    results["keep"], results["probe_beside_loss"] = parsed.keep, compare(scorer, collection, unseen)
    ray.init(address="local", num_cpus=parsed.num_cpus, include_dashboard=False, object_store_memory=200 << 20)
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder, "tasks.jsonl")
        lines = [{"name": task.name, "question": task.question, "test": task.rows} for task in seen.values()]
        tasks.write_text("".join(json.dumps(line) + "\n" for line in lines))
        options = RunOptions(
            adapters=parsed.adapters,
            base=parsed.base,
            out=f"{folder}/by-rows",
            clusters=parsed.clusters,
            rank=parsed.rank,
            gate=AUTO,
            keep=parsed.keep,
            tasks=str(tasks),
        )
        by_text = replace(options, out=f"{folder}/by-text", tasks="")
        results["by_rows"] = whole_job(options, scorer, collection.adapters, unseen, "gate by held-out rows")
        results["by_probe"] = whole_job(by_text, scorer, collection.adapters, unseen, "gate by the probe")
    ray.shutdown()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
