"""Between the passes: who shares a basis, decided by the samples that pass 1 left behind.

Some hundreds of adapters are clustered in one task, more of them in many (cluster_many.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from cluster.compression.clustering import (
    assign,
    assign_apart,
    group_by_tenant,
    joint_features,
    share_clusters,
    similarity,
)
from cluster.compression.sample import MANY, kind_energies
from compress_jobs.job import tasks
from compress_jobs.job.choose import Chosen
from compress_jobs.job.cluster_many import ClusteredPool, cluster_many
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once
from compress_jobs.job.prepare import Job
from compress_jobs.job.sample import KindEnergies, of_adapters, read_sample, tenants
from compress_jobs.progress import say

_SHOWN = 256  # adapters whose similarity stands for that of all


@dataclass(frozen=True)
class Clustered:
    """``labels`` (N,); the errors are estimates on the sample, of this clustering and of a random balanced split, of
    the adapters ``measured``; ``similarity`` (k, k) is the mean cosine within and across clusters, of all or of some
    hundreds of adapters. Empty where nobody had to choose, and similarity where clusters are many."""

    labels: list[int]
    measured: list[int]
    errors: list[float]
    random_errors: list[float]
    start: str
    similarity: list[list[float]]


def cluster_all(job: Job, chosen: Chosen) -> Clustered | None:
    """None where no adapter is meant for a basis."""
    context, adapter_ids = chosen.context, list(chosen.records)
    if not adapter_ids:
        return None
    wanted = int(context.options.clusters)
    num_clusters = min(wanted, len(adapter_ids))
    if num_clusters < wanted:
        say(f"--clusters {wanted} is more than the {len(adapter_ids)} adapters to cluster: using {num_clusters}")
    say(f"cluster: {len(adapter_ids)} adapters into {num_clusters}")
    if num_clusters == 1:
        return _without_choice(context, adapter_ids)
    energies = kind_energies(list(chosen.records.values()))
    if len(adapter_ids) >= MANY:
        return _cluster_pools(context, adapter_ids, num_clusters, energies, job.in_flight)
    found: Clustered = tasks.run_one(tasks.remote(cluster_adapters), context, adapter_ids, num_clusters, energies)
    return found


def _without_choice(context: JobContext, adapter_ids: Sequence[str]) -> Clustered:
    """One cluster for everybody, or for every tenant: nothing to choose, nothing to measure."""
    labels = [0] * len(adapter_ids)
    for cluster, adapters in enumerate(group_by_tenant(tenants(context, adapter_ids))):
        for adapter in adapters:
            labels[adapter] = cluster
    return Clustered(labels, [], [], [], "only one way", [])


def cluster_adapters(
    context: JobContext, adapter_ids: Sequence[str], num_clusters: int, energies: KindEnergies
) -> Clustered:
    """Assign the adapters to clusters by their samples."""

    def step() -> Clustered:
        sample = read_sample(context, adapter_ids, energies)
        rank, seed = int(context.options.rank), context.options.seed
        found = assign_apart(sample, tenants(context, adapter_ids), num_clusters, rank, seed)
        cosines = similarity(joint_features(sample, rank, seed), found.labels)
        errors = (found.errors.tolist(), found.random_errors.tolist())
        measured = list(range(len(adapter_ids)))
        return Clustered(found.labels.tolist(), measured, *errors, found.start, cosines.tolist())

    return once(context, f"{context.fits}clustered", Clustered, step)


def _cluster_pools(
    context: JobContext, adapter_ids: Sequence[str], num_clusters: int, energies: KindEnergies, in_flight: int
) -> Clustered:
    """All of them together, or every tenant's on their own."""
    pools = group_by_tenant(tenants(context, adapter_ids))
    shares = share_clusters([len(pool) for pool in pools], num_clusters)
    calls = [
        (context, f"{number}", [adapter_ids[i] for i in pool], of_adapters(energies, pool), share)
        for number, (pool, share) in enumerate(zip(pools, shares, strict=True))
    ]
    few = [number for number, pool in enumerate(pools) if len(pool) < MANY]
    results = tasks.run_bounded(tasks.remote(cluster_few), [calls[number] for number in few], in_flight)
    found = {few[index]: result for index, result in results}
    for number in sorted(set(range(len(pools))) - set(found)):
        step = partial(cluster_many, *calls[number], in_flight)
        found[number] = once(context, f"{context.fits}clustering/{number}", ClusteredPool, step)
    labels = [0] * len(adapter_ids)
    first = 0
    for number, (pool, share) in enumerate(zip(pools, shares, strict=True)):
        for adapter, label in zip(pool, found[number].labels, strict=True):
            labels[adapter] = label + first
        first += share
    ordered = [found[number] for number in range(len(pools))]
    return Clustered(
        labels,
        [pool[i] for pool, own in zip(pools, ordered, strict=True) for i in own.measured],
        [error for own in ordered for error in own.errors],
        [error for own in ordered for error in own.random_errors],
        "; ".join(dict.fromkeys(own.start for own in ordered)) + (", by tenant" if len(pools) > 1 else ""),
        _similarity(context, adapter_ids, energies, labels),
    )


def cluster_few(
    context: JobContext, name: str, adapter_ids: Sequence[str], energies: KindEnergies, num_clusters: int
) -> ClusteredPool:
    """One tenant's adapters, in one task."""

    def step() -> ClusteredPool:
        sample = read_sample(context, adapter_ids, energies)
        found = assign(sample, num_clusters, int(context.options.rank), context.options.seed)
        measured = list(range(len(adapter_ids)))
        return ClusteredPool(
            found.labels.tolist(), measured, found.errors.tolist(), found.random_errors.tolist(), found.start
        )

    return once(context, f"{context.fits}clustering/{name}", ClusteredPool, step)


def _similarity(
    context: JobContext, adapter_ids: Sequence[str], energies: KindEnergies, labels: Sequence[int]
) -> list[list[float]]:
    shown = _some_of_each(labels)
    if len(shown) <= 2 * len(set(labels)):
        return []
    own = of_adapters(energies, shown)
    call = (context, [adapter_ids[i] for i in shown], own, [labels[i] for i in shown])
    found: list[list[float]] = tasks.run_one(tasks.remote(cosines_of), *call)
    return found


def _some_of_each(labels: Sequence[int]) -> list[int]:
    """Adapters, as many of each cluster as ``_SHOWN`` allow."""
    left = dict.fromkeys(labels, max(1, _SHOWN // len(set(labels))))
    shown = []
    for adapter, cluster in enumerate(labels):
        if left[cluster]:
            left[cluster] -= 1
            shown.append(adapter)
    return shown


def cosines_of(
    context: JobContext, adapter_ids: Sequence[str], energies: KindEnergies, labels: Sequence[int]
) -> list[list[float]]:
    def step() -> list[list[float]]:
        sample = read_sample(context, adapter_ids, energies)
        features = joint_features(sample, int(context.options.rank), context.options.seed)
        cosines: list[list[float]] = similarity(features, np.array(labels)).tolist()
        return cosines

    return once(context, f"{context.fits}similarity", list[list[float]], step)
