"""How the adapters are compressed: as asked, or in the fewest bytes that meet a target error.

Sizes are weighed on the sample by Ray tasks, the best of them is fitted, and its error is confirmed on all modules;
where it misses the target there, the next best is taken instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cluster.adapters.record import AdapterRecord
from cluster.compression.choose import (
    Choice,
    CollectionShape,
    best_choice,
    candidate_labels,
    choose_rank,
    choose_svd,
    cluster_counts,
)
from cluster.compression.clustering import group_by_tenant, share_clusters
from cluster.compression.sample import kind_energies
from cluster.errors import ConfigError
from compress_jobs.job import tasks
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.context import JobContext
from compress_jobs.job.inspect import Collection
from compress_jobs.job.options import AUTO
from compress_jobs.job.parts import once
from compress_jobs.job.prepare import Job
from compress_jobs.job.sample import KindEnergies, read_sample, tenants
from compress_jobs.progress import say


@dataclass(frozen=True)
class Chosen:
    """``context``: with options that leave nothing to choose, once ``choose`` has been here. ``records``: the adapters
    meant for bases, as pass 1 read them; adapter indices count these. ``weighed``: what the choice was made from;
    ``confirmed``: the mean error on all modules of what was fitted of it."""

    context: JobContext
    records: Mapping[str, AdapterRecord]
    weighed: tuple[Choice, ...] = ()
    confirmed: Mapping[Choice, float] = field(default_factory=dict)

    def with_gate(self, gate: float) -> Chosen:
        return replace(self, context=replace(self.context, options=self.context.options.with_gate(gate)))

    def is_taken(self, choice: Choice) -> bool:
        options = self.context.options
        clusters = choice.clusters if choice.method == "svd" else int(options.clusters)
        return (choice.method, choice.clusters, choice.rank) == (options.method, clusters, options.rank)


def as_asked(job: Job, collection: Collection) -> Chosen:
    """With method svd no adapter is meant for a basis, and none that is opted out ever is."""
    options = job.asked
    joint = options.method != "svd" or options.auto
    meant = {i: record for i, record in collection.records.items() if joint and not options.is_raw(i)}
    return Chosen(job.context, meant)


def choose(job: Job, collection: Collection, chosen: Chosen) -> Chosen:
    """Weigh what is left to choose and take the best. Raises ConfigError where nothing meets the target."""
    asked, target = job.asked, job.asked.target_error
    adapter_ids, records = list(chosen.records), list(chosen.records.values())
    shape = collection_shape(job.context, records)
    ranks = int(shape.ranks.max())
    best_bytes = int(shape.ranks.sum(0) @ shape.sides.sum(1)) * shape.itemsize  # of the whole factors
    weighed: list[Choice] = []
    if asked.method in (AUTO, "svd"):
        spectra = [list(collection.spectra[adapter_id].values()) for adapter_id in adapter_ids]
        weighed += [c for c in choose_svd(shape, spectra, target) if asked.rank in (AUTO, c.rank)]
    counts = cluster_counts(len(records)) if asked.clusters == AUTO else [min(int(asked.clusters), len(records))]
    largest = int(shape.ranks.sum(0).max())
    ranks_tried = range(1, largest + 1) if asked.rank == AUTO else range(int(asked.rank), int(asked.rank) + 1)
    energies = kind_energies(records)
    for method in ("jd-full", "jd-diag") if asked.method == AUTO else (asked.method,):
        if method == "svd":
            continue
        best = best_choice(weighed, target)
        limit = best.size_bytes if best else best_bytes
        calls = [(job.context, adapter_ids, energies, shape, method, k, ranks_tried, limit) for k in counts]
        for _, choices in tasks.run_bounded(tasks.remote(weigh), calls, job.in_flight):
            weighed += choices
    weighed.sort(key=lambda choice: (choice.method, choice.clusters, choice.rank))
    _say_weighed(weighed, target)
    best = best_choice(weighed, target)
    if best is None:
        nearest = min(weighed, key=lambda choice: choice.error, default=None)
        seen = f"; the nearest is {_name(nearest)} with {nearest.error:.4f}" if nearest else ""
        raise ConfigError(
            f"--target-error {target}: nothing that was weighed meets it in fewer than the {best_bytes:,} bytes of the "
            f"adapters themselves (rank {ranks}){seen}; raise the target, or serve them whole with --raw '*'"
        )
    return _take(job, replace(chosen, weighed=tuple(weighed)), best)


def confirm_or_take_next(
    job: Job, chosen: Chosen, labels: Sequence[int], errors: Mapping[str, AdapterError]
) -> tuple[Chosen, bool]:
    """``errors``: of the fitted adapters on all modules, in their clusters ``labels``. Whether they meet the target;
    where they do not, the next best choice is taken instead. Raises ConfigError where none is left."""
    if not job.asked.auto or not errors:
        return chosen, True
    target = job.asked.target_error
    error = float(np.mean([found.error for found in errors.values()]))
    now = next(choice for choice in chosen.weighed if chosen.is_taken(choice))
    chosen = replace(chosen, confirmed={**chosen.confirmed, now: error})
    if error <= target:
        say(f"confirmed on all modules: {_name(now)} has a mean error of {error:.4f}, target {target}")
        return chosen, True
    say(f"not confirmed: {_name(now)} has a mean error of {error:.4f} on all modules, target {target}")
    weighed = list(chosen.weighed)
    if job.asked.rank == AUTO and not any(_size(c) == (now.method, now.clusters, now.rank + 1) for c in weighed):
        # Where the sample was too hopeful, the smallest step up is surely worth weighing.
        shape = collection_shape(job.context, list(chosen.records.values()))
        size = shape.joint_bytes(np.asarray(labels), now.rank + 1, now.method == "jd-diag")
        weighed.append(Choice(now.method, now.clusters, now.rank + 1, size, 0.999 * now.error * target / error))
    chosen = replace(chosen, weighed=tuple(weighed))
    hope = error / now.error  # how far the sample's errors fall short; SVD's are exact
    left = [
        choice if choice.method == "svd" else replace(choice, error=choice.error * hope)
        for choice in weighed
        if choice not in chosen.confirmed
    ]
    best = best_choice(left, target)
    if best is None:
        raise ConfigError(
            f"--target-error {target}: {_name(now)} met it on the sample but has {error:.4f} on all modules, and "
            "nothing else that was weighed meets it; raise the target, or let more be chosen (--rank auto)"
        )
    return _take(job, chosen, next(choice for choice in weighed if _size(choice) == _size(best))), False


def weigh(
    context: JobContext,
    adapter_ids: Sequence[str],
    energies: KindEnergies,
    shape: CollectionShape,
    method: str,
    num_clusters: int,
    ranks: range,
    max_bytes: int,
) -> list[Choice]:
    """What one method in one number of clusters costs (see ``cluster.compression.choose.choose_rank``)."""

    def step() -> list[Choice]:
        sample = read_sample(context, adapter_ids, energies)
        members = group_by_tenant(tenants(context, adapter_ids))
        candidates: list[NDArray[np.int64]] = []
        for adapters, share in zip(members, share_clusters(list(map(len, members)), num_clusters), strict=True):
            own = candidate_labels(sample.select(adapters), share, context.options.seed)
            first = int(candidates[0].max()) + 1 if candidates else 0
            candidates = candidates or [np.full(len(adapter_ids), -1) for _ in range(2)]
            for labels, found in zip(candidates, (own[0], own[-1]), strict=True):
                labels[adapters] = found + first
        target, seed = context.options.target_error, context.options.seed
        return choose_rank(sample, shape, candidates, method, ranks, target, max_bytes, seed)

    name = f"weighed/{method}-{num_clusters}-{ranks.start}-{ranks.stop}-{max_bytes}"
    return once(context, name, list[Choice], step)


def collection_shape(context: JobContext, records: Sequence[AdapterRecord]) -> CollectionShape:
    return CollectionShape.of(records, context.base.modules, context.dtype.itemsize)


def _take(job: Job, chosen: Chosen, choice: Choice) -> Chosen:
    say(f"chosen: {_name(choice)}, {choice.size_bytes:,} bytes resident, error {choice.error:.4f}")
    options = job.asked.with_choice(choice.method, choice.clusters, choice.rank)
    context = replace(job.context, options=options)
    return replace(chosen, context=context, records={} if choice.method == "svd" else chosen.records)


def _say_weighed(weighed: Sequence[Choice], target: float) -> None:
    for choice in weighed:
        meets = "meets" if best_choice([choice], target) else "-"
        say(f"weighed  {_name(choice):<34} {choice.size_bytes:>15,} bytes  error {choice.error:7.4f}  {meets}")


def _size(choice: Choice) -> tuple[str, int, int]:
    return choice.method, choice.clusters, choice.rank


def _name(choice: Choice) -> str:
    clusters = "" if choice.method == "svd" else f", {choice.clusters} clusters"
    return f"{choice.method}{clusters}, rank {choice.rank}"
