"""Train a collection of real LoRA adapters, several in a batch: many tasks, data subsets, seeds and step counts.

    python -m infra.train_zoo --base build/base --out zoo --adapters 300 --plan    # what it would train
    python -m infra.train_zoo --base build/base --out zoo --adapters 300           # trains it

The adapters are spread over the grid task x data subset x seed x steps; a larger --adapters adds to a smaller
one. An adapter that is already in --out is skipped, so the same line goes on where a killed run stopped. It
writes adapters/<id>/ (PEFT folders in bfloat16), tasks.jsonl (held-out rows) and training.jsonl (how each was
trained, held-out loss and exact match of base and adapter, how near to low rank it is: more steps alone need
not make it less so, look at the printed table). A Ray task trains several adapters side by side, on a GPU where the
cluster has GPUs. On several nodes, --base and --out are folders that every node sees. Needs the `train` extra:
pip install -c constraints.txt -e '.[train]'.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.adapters.base import read_base
from cluster.adapters.listing import CONFIG_FILE
from cluster.errors import ConfigError, CtsError
from compress_jobs.job.tasks import run_bounded
from compress_jobs.progress import say, track
from infra.train_zoo.plan import LEARNING_RATE, STEPS, AdapterPlan, plan_adapters, side_by_side
from infra.train_zoo.stored import Folders, Record, write_text
from infra.train_zoo.task import LONG_ANSWERS, Task
from infra.train_zoo.tasks import all_tasks
from infra.train_zoo.training import TRUNCATION_RANKS, loaded_base, train_adapters

_TASK_MEMORY_BYTES = 3 << 30  # measured: 2 GB with four adapters side by side
_TOGETHER = {"cpu": 4, "gpu": 64}  # more of them is no faster


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        return run(options)
    except CtsError as error:
        say(f"train_zoo: {error}")
        return 2 if isinstance(error, ConfigError) else 1


def run(options: argparse.Namespace) -> int:
    """Plan, train what is missing, write the tables, tell."""
    tasks = all_tasks()
    names = [task.name for task in tasks.values() if (task.family == LONG_ANSWERS) == options.long_answers]
    plans = plan_adapters(
        names, options.adapters, steps=options.steps, learning_rate=options.learning_rate, only=options.only
    )
    if options.plan:
        _print_plan(plans, tasks)
        return 0
    base = read_base(str(options.base))
    folders = Folders(options.out.absolute())
    missing = [plan for plan in plans if not _is_there(folders.adapter(plan), base.name)]
    if len(missing) < len(plans):
        say(f"{len(plans) - len(missing)} of {len(plans)} adapters are there already")
    failed = []
    try:
        if missing:
            failed = _train(missing, str(options.base.absolute()), folders, options)
    finally:
        records = write_tables(folders, tasks)
    for message in failed:
        say(f"failed: {message}")
    _print_summary(records)
    return 1 if failed else 0


def _is_there(folder: Path, base_name: str) -> bool:
    if not folder.exists():
        return False
    other = json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]
    if other != base_name:
        raise ConfigError(f"--out holds {folder.name}, trained on {other}, not on {base_name}; give another folder")
    return True


def _train(plans: Sequence[AdapterPlan], base: str, folders: Folders, options: argparse.Namespace) -> list[str]:
    """Train every plan; returns what failed, which stops none of the others."""
    _connect(options)
    resources = ray.cluster_resources()
    num_cpus, num_gpus = max(1, int(resources["CPU"])), int(resources.get("GPU", 0))
    groups = side_by_side(plans, options.together or _TOGETHER["gpu" if num_gpus else "cpu"])
    in_flight = min(len(groups), num_gpus or num_cpus)
    # Several tasks make better use of cores than several threads in one.
    threads = 1 if num_gpus else max(1, num_cpus // in_flight)
    asked: dict[str, Any] = (
        {"num_gpus": 1}
        if num_gpus
        else {"memory": min(_TASK_MEMORY_BYTES, int(resources.get("memory", _TASK_MEMORY_BYTES)))}
    )
    say(
        f"train {len(plans)} adapters, up to {len(groups[0])} in a batch, {in_flight} batches at once "
        f"on {num_gpus or 'no'} GPUs and {num_cpus} CPUs"
    )
    # max_calls 0: by default a worker with a GPU ends after one task, and a new one has to load everything again.
    task = ray.remote(num_cpus=threads, max_retries=3, max_calls=0, **asked)(_train_task)
    failed = []
    try:
        calls = [(group, base, options.dtype, folders, threads) for group in groups]
        for _, failures in track(run_bounded(task, calls, in_flight), len(calls), "train"):
            failed += failures
    finally:
        ray.shutdown()
    return failed


def _train_task(plans: Sequence[AdapterPlan], base: str, dtype: str, folders: Folders, threads: int) -> list[str]:
    """What a Ray worker does; answers with what is wrong with the adapters that cannot be trained."""
    # Where Ray lost the worker in the midst of its work and tries again, some are there.
    missing = [plan for plan in plans if not folders.adapter(plan).exists()]
    if not missing:
        return []
    torch.set_num_threads(threads)
    return train_adapters(missing, all_tasks(), loaded_base(base, getattr(torch, dtype)), folders)[1]


def _connect(options: argparse.Namespace) -> None:
    """Join the Ray cluster that this runs on, or start one here."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local",
        num_cpus=options.num_cpus,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level="warning",
    )


def write_tables(folders: Folders, tasks: dict[str, Task]) -> list[Record]:
    """tasks.jsonl and training.jsonl over every adapter that is in the folder, by id; returns the records."""
    records = []
    for path in sorted((folders.root / "records").glob("*.json")):
        if (folders.root / "adapters" / path.stem).exists():
            records.append(json.loads(path.read_text()))
    if not records:
        return records
    lines = []
    held_out = {name: tasks[name].split()[0] for name in sorted({record["task"] for record in records})}
    for record in records:
        task = tasks[record["task"]]
        line = {"name": record["name"], "family": task.family, "question": task.question, "licence": task.licence}
        lines.append(line | {"test": held_out[task.name]})
    for name, documents in (("tasks.jsonl", lines), ("training.jsonl", records)):
        text = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        write_text(folders.root / name, text)
    return records


def _print_plan(plans: Sequence[AdapterPlan], tasks: dict[str, Task]) -> None:
    for plan in plans:
        shape = plan.shape
        modules = "/".join(module.removesuffix("_proj") for module in shape.modules)
        kind = f"rank {shape.rank:2} alpha {shape.alpha:2} on {modules}{' rsLoRA' if shape.rslora else ''}"
        print(f"{plan.adapter_id:32} {tasks[plan.task].family:15} {kind:32} seed {plan.seed}")
    steps = Counter(plan.steps for plan in plans)
    print(
        f"{len(plans)} adapters of {len({plan.task for plan in plans})} tasks, "
        f"{sum(plan.steps for plan in plans)} steps: "
        + ", ".join(f"{count} of {number}" for number, count in sorted(steps.items()))
    )


def _print_summary(records: Sequence[Record]) -> None:
    """By step count: means of loss, exact match, and what truncation to a few ranks loses."""
    by_steps: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_steps[record["steps"]].append(record)
    ranks = "".join(f"  rank {rank}" for rank in TRUNCATION_RANKS)
    print(f"{'steps':>6}{'adapters':>10}{'loss base':>11}{'loss':>7}{'match base':>12}{'match':>7}   SVD error{ranks}")
    for steps, group in sorted(by_steps.items()):

        def mean(value: Any, group: Sequence[Record] = group) -> float:
            return math.fsum(value(record) for record in group) / len(group)

        errors = "".join(f"{mean(lambda r, rank=rank: r['svd_error'][str(rank)]):8.3f}" for rank in TRUNCATION_RANKS)
        print(
            f"{steps:6}{len(group):10}{mean(lambda r: r['base_loss']):11.3f}{mean(lambda r: r['lora_loss']):7.3f}"
            f"{mean(lambda r: r['base_em']):12.3f}{mean(lambda r: r['lora_em']):7.3f}            {errors}"
        )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m infra.train_zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, default=Path("build/base"), help="folder of the base model (default: %(default)s)")
    add("--out", type=Path, required=True, help="folder of the collection; what is there stays")
    add("--adapters", type=_positive, required=True, help="how many adapters of the grid")
    add("--steps", type=_positive, nargs="+", default=STEPS, help=f"step counts of the grid (default: {STEPS})")
    add("--only", nargs="+", default=(), metavar="PATTERN", help="only ids like these, with *")
    add("--long-answers", action="store_true", help="another grid: the twelve tasks whose answers are long")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="in ids where another (default: %(default)s)")
    add("--together", type=_positive, help="adapters in a batch (default: 4 on a CPU, 64 on a GPU)")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base (default: %(default)s)")
    add("--num-cpus", type=_positive, help="CPUs of the Ray that is started here (default: all)")
    add("--plan", action="store_true", help="print what would be trained, and stop")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
