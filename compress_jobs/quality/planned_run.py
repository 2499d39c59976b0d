"""What exactly one run would give, from a sample of the adapters: grades, bytes, devices.

The sampled adapters stand for all, over and over, in clusters of the run's size; each is graded as the run grades it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.adapters.base import BaseModel
from cluster.bundle.manifest import Method
from cluster.compression.balanced import random_balanced
from cluster.compression.choose import CollectionShape
from cluster.compression.clustering import adapter_errors, assign
from cluster.compression.svd import smallest_rank
from compress_jobs.quality.estimate import Sampled, predict, tail


@dataclass(frozen=True)
class PlannedRun:
    """``clusters`` are those that somebody is served from. ``error``: mean, as served."""

    method: str
    clusters: int
    rank: int
    gate: float
    on_basis: int
    truncated: int
    raw: int
    size_bytes: int
    error: float
    adapters_per_device: int
    devices: int

    def line(self) -> str:
        how = f"{self.method}, {self.clusters} clusters of rank {self.rank}" if self.method != "svd" else "svd"
        return (
            f"run        {how}, gate {self.gate:g}: {self.on_basis} on a basis, {self.truncated} truncated, {self.raw} "
            f"raw; {self.size_bytes:,} bytes resident, mean error {self.error:.4f}; {self.devices} devices"
        )


def plan_run(
    sampled: Sampled, base: BaseModel, num_adapters: int, usable_bytes: int, method: Method, itemsize: int
) -> PlannedRun:
    """``method`` as the manifest would record it."""
    n = len(sampled.records)
    shape = CollectionShape.of(sampled.records, base.modules, itemsize)
    spectra = [[np.asarray(values) for values in modules.values()] for modules in sampled.spectra]
    ranks, cut_errors = zip(*(smallest_rank(own, method.gate) for own in spectra), strict=True)
    if method.name == "svd":
        ranks = tuple(max(rank, method.rank) for rank in ranks)
        cut_errors = tuple(tail(own, rank) for own, rank in zip(spectra, ranks, strict=True))
    whole = [rank >= max(map(len, own)) for own, rank in zip(spectra, ranks, strict=True)]
    alone_bytes = np.array([_own_bytes(sampled, base, i, ranks[i], whole[i], itemsize) for i in range(n)])
    stands_for = np.arange(num_adapters) % n
    on_basis = np.zeros(num_adapters, dtype=bool)
    errors = np.array([0.0 if is_whole else e for e, is_whole in zip(cut_errors, whole, strict=True)])[stands_for]
    size, clusters = 0, 0
    if method.name != "svd":
        k = min(method.clusters, num_adapters)
        if num_adapters == n:  # all were read: as the run clusters them
            labels = assign(sampled.sample, k, method.rank, method.seed).labels
            there = adapter_errors(sampled.sample, labels, method.rank, method.seed, method.name)
        else:
            lost, extrapolated = predict(sampled.sample, num_adapters / k, method.rank, method.seed, method.name)
            labels = random_balanced(num_adapters, k, np.random.default_rng(method.seed))
            there = np.minimum(lost + extrapolated, 1.0)[stands_for]
        for cluster in range(k):
            members = np.flatnonzero(labels == cluster)
            kept = members[there[members] <= method.gate]
            own = CollectionShape(shape.ranks[stands_for[members]], shape.sides, itemsize)
            basis_bytes = own.cluster_bytes(method.rank, method.name == "jd-diag", len(kept))
            # As the gate does: a basis that it leaves too few on is dissolved.
            if len(kept) and (2 * len(kept) >= len(members) or basis_bytes <= alone_bytes[stands_for[kept]].sum()):
                on_basis[kept], errors[kept] = True, there[kept]
                size, clusters = size + basis_bytes, clusters + 1
    alone = stands_for[~on_basis]
    size += int(alone_bytes[alone].sum())
    num_raw = int(np.array(whole)[alone].sum())
    return PlannedRun(
        method=method.name,
        clusters=clusters,
        rank=method.rank,
        gate=method.gate,
        on_basis=int(on_basis.sum()),
        truncated=len(alone) - num_raw,
        raw=num_raw,
        size_bytes=size,
        error=float(errors.mean()),
        adapters_per_device=int(usable_bytes / (size / num_adapters)),
        devices=max(1, math.ceil(size / usable_bytes)),
    )


def _own_bytes(sampled: Sampled, base: BaseModel, index: int, rank: int, whole: bool, itemsize: int) -> int:
    """Of an adapter's own factors, cut or whole; whole ones in float32 where the stored dtype would round them."""
    own = CollectionShape.of([sampled.records[index]], base.modules, itemsize)
    if not whole:
        return own.svd_bytes(rank)
    return own.svd_bytes(int(own.ranks.max())) * (1 if sampled.exact[index] else 4 // itemsize)
