"""Between the passes: the samples that pass 1 left behind, the choice of method and size, and the clustering."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.adapters.factors import Factors
from cluster.bundle.manifest import tenant_of
from cluster.compression.choose import Choice, CollectionShape, candidate_labels, choose_rank
from cluster.compression.clustering import assign_apart, group_by_tenant, joint_features, share_clusters, similarity
from cluster.compression.sample import Sample
from cluster.compression.stack import stack_factors
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once, read_tensors

KindEnergies = Mapping[str, NDArray[np.float64]]
"""Kind of module -> the adapters' energies in all modules of that kind (N,)."""


@dataclass(frozen=True)
class Clustered:
    """``labels`` (N,); the errors (N,) are estimates on the sample, of this clustering and of a random balanced
    split; ``similarity`` (k, k) is the mean cosine within and across clusters. Empty where nobody had to choose."""

    labels: list[int]
    errors: list[float]
    random_errors: list[float]
    start: str
    similarity: list[list[float]]


def cluster_adapters(
    context: JobContext, adapter_ids: Sequence[str], num_clusters: int, energies: KindEnergies
) -> Clustered:
    """Assign the adapters to clusters by their samples."""

    def step() -> Clustered:
        sample = read_sample(context, adapter_ids, energies)
        rank, seed = int(context.options.rank), context.options.seed
        found = assign_apart(sample, _tenants(context, adapter_ids), num_clusters, rank, seed)
        cosines = similarity(joint_features(sample, rank, seed), found.labels)
        errors = (found.errors.tolist(), found.random_errors.tolist())
        return Clustered(found.labels.tolist(), *errors, found.start, cosines.tolist())

    return once(context, f"{context.fits}clustered", Clustered, step)


def without_choice(context: JobContext, adapter_ids: Sequence[str]) -> Clustered:
    """One cluster for everybody, or for every tenant: nothing to choose, nothing to measure."""
    labels = [0] * len(adapter_ids)
    for cluster, adapters in enumerate(group_by_tenant(_tenants(context, adapter_ids))):
        for adapter in adapters:
            labels[adapter] = cluster
    return Clustered(labels, [], [], "only one way", [])


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
        members = group_by_tenant(_tenants(context, adapter_ids))
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


def read_sample(context: JobContext, adapter_ids: Sequence[str], energies: KindEnergies) -> Sample:
    by_module: dict[str, list[tuple[int, Factors]]] = {}
    for member, adapter_id in enumerate(adapter_ids):
        for module, factors in _by_module(read_tensors(context, context.sample_key(adapter_id))).items():
            by_module.setdefault(module, []).append((member, factors))
    # One by one: the sample is the largest thing this task holds, and it need not be there twice.
    stacks = {module: stack_factors(by_module.pop(module)) for module in sorted(by_module)}
    present = {module: stack for module, stack in stacks.items() if stack is not None}
    return Sample.of(present, len(adapter_ids), energies)


def _by_module(tensors: dict[str, Tensor]) -> dict[str, Factors]:
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    return {module: (tensors[f"{module}.A"].float(), tensors[f"{module}.B"].float()) for module in modules}


def _tenants(context: JobContext, adapter_ids: Sequence[str]) -> list[str]:
    return [tenant_of(adapter_id) if context.options.isolate else "" for adapter_id in adapter_ids]
