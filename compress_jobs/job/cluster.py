"""Between the passes: who shares a basis, decided by the samples that pass 1 left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.compression.clustering import assign_apart, group_by_tenant, joint_features, similarity
from cluster.compression.sample import kind_energies
from compress_jobs.job import tasks
from compress_jobs.job.choose import Chosen
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once
from compress_jobs.job.sample import KindEnergies, read_sample, tenants
from compress_jobs.progress import say


@dataclass(frozen=True)
class Clustered:
    """``labels`` (N,); the errors (N,) are estimates on the sample, of this clustering and of a random balanced
    split; ``similarity`` (k, k) is the mean cosine within and across clusters. Empty where nobody had to choose."""

    labels: list[int]
    errors: list[float]
    random_errors: list[float]
    start: str
    similarity: list[list[float]]


def cluster_all(chosen: Chosen) -> Clustered | None:
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
    found: Clustered = tasks.run_one(tasks.remote(cluster_adapters), context, adapter_ids, num_clusters, energies)
    return found


def _without_choice(context: JobContext, adapter_ids: Sequence[str]) -> Clustered:
    """One cluster for everybody, or for every tenant: nothing to choose, nothing to measure."""
    labels = [0] * len(adapter_ids)
    for cluster, adapters in enumerate(group_by_tenant(tenants(context, adapter_ids))):
        for adapter in adapters:
            labels[adapter] = cluster
    return Clustered(labels, [], [], "only one way", [])


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
        return Clustered(found.labels.tolist(), *errors, found.start, cosines.tolist())

    return once(context, f"{context.fits}clustered", Clustered, step)
