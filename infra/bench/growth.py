"""What more adapters do to joint compression: the paper's table on the first N of one collection, for several N.

    python -m infra.bench.growth --adapters DIR/adapters --tasks DIR/tasks.jsonl --sizes 50 100 200 300 --out FILE

The adapters of DIR in one random order; a size is the first N of it. The first ``--sample`` of them, the same at every
size, answer their held-out rows; errors and bytes are of all N. At each size: JD-Full on one basis, JD-Full on a basis
for each ``--per-cluster`` adapters, JD-Diag, and plain SVD in the bytes of each; then a whole job of the clustered
setting, which chooses its gate by the probe, and what it serves. Every row is added to FILE as it is measured; what
stands there is not measured again. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.adapters.base import read_base
from cluster.adapters.layout import Layout
from compress_jobs.job.options import AUTO, RunOptions
from compress_jobs.quality.collection import Collection, read_collection
from compress_jobs.quality.examiner import Examiner
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.sweep import Setting, sweep
from compress_jobs.quality.sweep_table import head, line
from compress_jobs.quality.task import read_tasks
from infra.bench.gate import BASE, whole_job


def settings(num_adapters: int, parsed: argparse.Namespace) -> list[Setting]:
    clusters = max(1, round(num_adapters / parsed.per_cluster))
    return [
        Setting("jd-full", parsed.rank, clusters),
        Setting("jd-full", parsed.single_rank, 1),
        Setting("jd-diag", parsed.diag_rank, 1),
    ]


class Rows:
    """What has been measured, a line of JSON each: the size, the setting or "job", and the figures."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.exists():
            for text in path.read_text().splitlines():
                row = json.loads(text)
                self.found[_key(row["adapters"], row["what"])] = row

    def has(self, num_adapters: int, what: object) -> bool:
        return _key(num_adapters, what) in self.found

    def add(self, num_adapters: int, what: object, figures: dict[str, Any]) -> None:
        row = {"adapters": num_adapters, "what": what, **figures}
        self.found[_key(num_adapters, what)] = row
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _key(num_adapters: int, what: object) -> str:
    return json.dumps([num_adapters, what])


def job_options(ids: Sequence[str], out: str, parsed: argparse.Namespace) -> RunOptions:
    """A run of these adapters in the clustered setting, whose gate the probe chooses."""
    return RunOptions(
        adapters=parsed.adapters,
        base=parsed.base,
        out=out,
        only=tuple(ids),
        clusters=settings(len(ids), parsed)[0].clusters or 1,
        rank=parsed.rank,
        gate=AUTO,
        keep=parsed.keep,
    )


def measure(parsed: argparse.Namespace, everything: Collection, modules: Iterable[str]) -> Rows:
    order = random.Random(parsed.seed).sample(sorted(everything.adapters), len(everything.adapters))
    sampled = set(order[: parsed.sample])
    tasks = {name: task for name, task in read_tasks(parsed.tasks, parsed.rows).items() if name in sampled}
    scorer, rows = Scorer(parsed.base), Rows(parsed.out)
    examiner = Examiner(scorer, everything.adapters, tasks)
    for size in parsed.sizes:
        ids = order[:size]
        collection = Collection.of({name: everything.adapters[name] for name in ids}, modules)
        print("\n".join([f"{size} adapters", *head(examiner, collection.size_bytes)]), flush=True)
        missing = [setting for setting in settings(size, parsed) if not rows.has(size, asdict(setting))]
        for row in sweep(collection, examiner, missing, parsed.seed):
            print(line(row, collection.size_bytes), flush=True)
            measured = {"compressed": row.compressed.to_json(), "svd_equal_bytes": row.svd_equal_bytes.to_json()}
            rows.add(size, asdict(row.setting), {"uncompressed_bytes": collection.size_bytes, **measured})
        if not rows.has(size, "job"):
            ray.init(address="local", num_cpus=parsed.num_cpus, include_dashboard=False, object_store_memory=200 << 20)
            with tempfile.TemporaryDirectory() as folder:
                options = job_options(ids, f"{folder}/out", parsed)
                how = f"{size} adapters, gate by the probe"
                rows.add(size, "job", {"job": whole_job(options, scorer, everything.adapters, tasks, how)})
            ray.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", metavar="DIR", required=True)
    parser.add_argument("--tasks", metavar="FILE", type=Path, required=True)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True)
    parser.add_argument("--base", metavar="PATH", default=str(BASE))
    parser.add_argument("--sizes", metavar="N", type=int, nargs="+", default=[50, 100, 200, 300])
    parser.add_argument("--sample", metavar="N", type=int, default=40)
    parser.add_argument("--rows", metavar="N", type=int, default=16, help="held-out rows an adapter (default: 16)")
    parser.add_argument("--per-cluster", metavar="N", type=int, default=25)
    parser.add_argument("--rank", metavar="R", type=int, default=16, help="of the clustered setting (default: 16)")
    parser.add_argument("--single-rank", metavar="R", type=int, default=32, help="of one basis (default: 32)")
    parser.add_argument("--diag-rank", metavar="R", type=int, default=64, help="of JD-Diag (default: 64)")
    parser.add_argument("--keep", metavar="S", type=float, default=0.99)
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the order (default: 0)")
    parser.add_argument("--num-cpus", metavar="N", type=int, default=2)
    parsed = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    base = read_base(parsed.base)
    everything = read_collection(parsed.adapters, base, Layout())
    if max(parsed.sizes) > len(everything.adapters) or parsed.sample > min(parsed.sizes):
        parser.error(f"--sizes {parsed.sizes}: expected {parsed.sample} (--sample) to {len(everything.adapters)}, all")
    rows = measure(parsed, everything, base.modules)
    options = {name: str(value) for name, value in vars(parsed).items()}
    print(json.dumps({**options, "torch": torch.__version__, "rows": len(rows.found)}))


if __name__ == "__main__":
    main()
