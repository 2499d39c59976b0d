"""Which adapters share a basis: one balanced cluster per adapter over all modules.

Works on a sample of modules. Several starts (a seeded random balanced split, k-means on the cores of one
joint basis, another random split), each improved by moving adapters to the cluster that captures them best;
the lowest total error wins, and the plain random split's error stands beside it: a clustering that is no
better than random is not presented as one.

Trap: after a fit every adapter's own cluster looks best, because it was fitted on it. So moves are judged by
bases that the adapter had no part in: each cluster is fitted on half of its adapters, the other half is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.compression.balanced import Labels, balanced_assignment, balanced_kmeans, random_balanced
from cluster.compression.basis import Basis, captured_energy, relative_errors, unit_cores
from cluster.compression.jd_full import jd_full
from cluster.compression.methods import METHODS
from cluster.compression.sample import Sample
from cluster.compression.stack import FactorStack

MAX_ROUNDS = 6


@dataclass(frozen=True)
class Assignment:
    """``errors`` and ``random_errors`` (N,) are the adapters' errors over the sampled modules, with these labels and
    with a random balanced split; ``start`` names the start that won."""

    labels: Labels
    errors: NDArray[np.float64]
    random_labels: Labels
    random_errors: NDArray[np.float64]
    start: str

    @property
    def error(self) -> float:
        return float(self.errors.mean())

    @property
    def random_error(self) -> float:
        return float(self.random_errors.mean())


def assign(sample: Sample, num_clusters: int, rank: int, seed: int) -> Assignment:
    """Balanced labels of least mean error among all starts. Deterministic in its arguments.

    ``num_clusters`` must not exceed the number of adapters; no cluster comes out empty. Judged by JD-Full,
    whatever the method: what matters is which adapters have their subspaces in common.
    """
    assert 1 <= num_clusters <= sample.num_adapters
    rng = np.random.default_rng(seed)
    random_labels = random_balanced(sample.num_adapters, num_clusters, rng)
    random_errors = adapter_errors(sample, random_labels, rank, seed)
    if num_clusters == 1 or num_clusters == sample.num_adapters:
        return Assignment(random_labels, random_errors, random_labels, random_errors, "only one way")
    starts = {
        "random": random_labels,
        "k-means on joint cores": balanced_kmeans(joint_features(sample, rank, seed), num_clusters, rng),
        "second random": random_balanced(sample.num_adapters, num_clusters, rng),
    }
    best = Assignment(random_labels, random_errors, random_labels, random_errors, "random, unimproved")
    for name, labels in starts.items():
        labels, errors = _improve(sample, labels, rank, seed, rng)
        if errors.mean() < best.error:
            best = Assignment(labels, errors, random_labels, random_errors, name)
    return best


def assign_apart(sample: Sample, tenants: Sequence[str], num_clusters: int, rank: int, seed: int) -> Assignment:
    """As ``assign``, but no cluster holds adapters of two tenants (``tenants`` (N,): whose each adapter is).

    Every tenant has at least one cluster of its own, so there may be more than ``num_clusters``.
    """
    members = group_by_tenant(tenants)
    shares = share_clusters([len(adapters) for adapters in members], num_clusters)
    labels, random_labels = np.zeros((2, len(tenants)), dtype=np.int64)
    errors, random_errors = np.zeros(len(tenants)), np.zeros(len(tenants))
    starts, first = [], 0
    for adapters, share in zip(members, shares, strict=True):
        own = assign(sample.select(adapters), share, rank, seed)
        labels[adapters], random_labels[adapters] = own.labels + first, own.random_labels + first
        errors[adapters], random_errors[adapters] = own.errors, own.random_errors
        starts.append(own.start)
        first += share
    return Assignment(labels, errors, random_labels, random_errors, "; ".join(dict.fromkeys(starts)) + ", by tenant")


def group_by_tenant(tenants: Sequence[str]) -> list[list[int]]:
    """Each tenant's adapters, tenants in alphabetical order."""
    return [[i for i, of in enumerate(tenants) if of == tenant] for tenant in sorted(set(tenants))]


def share_clusters(sizes: Sequence[int], num_clusters: int) -> list[int]:
    """Clusters for each tenant of ``sizes[t]`` adapters: one at least, then where most adapters share one."""
    shares = [1] * len(sizes)
    while sum(shares) < min(num_clusters, sum(sizes)):
        shares[max(range(len(sizes)), key=lambda t: sizes[t] / shares[t] if shares[t] < sizes[t] else 0)] += 1
    return shares


def adapter_errors(
    sample: Sample, labels: Labels, rank: int, seed: int, method: str = "jd-full"
) -> NDArray[np.float64]:
    """sum_m ||M - M^||^2 / sum_m ||M||^2 (N,), each cluster fitted on all its adapters, estimated on the sample."""
    errors = np.zeros(sample.num_adapters)
    for m, stack in enumerate(sample.stacks):
        for positions, basis in _fit(stack, labels, rank, seed, method).values():
            own = stack.select(positions)
            relative = relative_errors(own, basis, METHODS[method].cores(own, basis))
            errors[list(own.members)] += sample.weights[list(own.members), m] * relative.cpu().numpy()
    return errors


def _fit(
    stack: FactorStack, labels: Labels, rank: int, seed: int, method: str = "jd-full"
) -> dict[int, tuple[list[int], Basis]]:
    """Cluster -> (its positions in the stack, its basis), for clusters that have adapters there."""
    member_labels = labels[list(stack.members)]
    fitted = {}
    for cluster in np.unique(member_labels[member_labels >= 0]):
        positions = np.flatnonzero(member_labels == cluster).tolist()
        fitted[int(cluster)] = (positions, METHODS[method].fit(stack.select(positions), rank, seed))
    return fitted


def _improve(
    sample: Sample, labels: Labels, rank: int, seed: int, rng: np.random.Generator
) -> tuple[Labels, NDArray[np.float64]]:
    """Move adapters by held-out gains until the error stops falling; the best labels seen and their errors."""
    k = int(labels.max()) + 1
    best, best_errors = labels, adapter_errors(sample, labels, rank, seed)
    for _ in range(MAX_ROUNDS):
        gains = _held_out_gains(sample, labels, k, rank, seed, rng)
        moved = balanced_assignment(gains, labels)
        if (moved == labels).all():
            break
        labels, errors = moved, adapter_errors(sample, moved, rank, seed)
        if errors.mean() >= best_errors.mean():
            break
        best, best_errors = labels, errors
    return best, best_errors


def _held_out_gains(
    sample: Sample, labels: Labels, k: int, rank: int, seed: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(N, k): energy of each adapter that each cluster's basis captures, fitted without the adapter's half."""
    gains = np.zeros((sample.num_adapters, k))
    # Half of every cluster: one with nobody left to fit it would look like one that captures nothing.
    by_cluster = np.argsort(labels + rng.random(sample.num_adapters))
    halves = np.empty(sample.num_adapters, dtype=np.int64)
    halves[by_cluster] = np.arange(sample.num_adapters) % 2
    for half in (0, 1):
        fit_labels = np.where(halves == half, -1, labels)
        for m, stack in enumerate(sample.stacks):
            judged = [i for i, member in enumerate(stack.members) if halves[member] == half]
            if not judged:
                continue
            held_out = stack.select(judged)
            members = list(held_out.members)
            for cluster, (_, basis) in _fit(stack, fit_labels, rank, seed).items():
                captured = captured_energy(held_out, basis).numpy()
                gains[members, cluster] += sample.weights[members, m] * captured
    return gains


def joint_features(sample: Sample, rank: int, seed: int) -> NDArray[np.float64]:
    """(N, features): each adapter's cores on one basis shared by all, of unit length. (Raw cores differ in
    size more than in direction, and k-means on them collapses into one large cluster.)"""
    parts = []
    for m, stack in enumerate(sample.stacks):
        cores = unit_cores(stack, jd_full(stack, rank, seed)).flatten(1).double().numpy()
        part = np.zeros((sample.num_adapters, cores.shape[1]))
        part[list(stack.members)] = cores
        parts.append(part * np.sqrt(sample.weights[:, m : m + 1]))
    features = np.concatenate(parts, axis=1)
    unit: NDArray[np.float64] = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    return unit


def similarity(features: NDArray[np.float64], labels: Labels) -> NDArray[np.float64]:
    """(k, k): mean cosine between the adapters of two clusters; on the diagonal between those of one, each pair
    of different adapters once (1 where it has only one). features (N, F) of unit length."""
    k = int(labels.max()) + 1
    sums = np.stack([features[labels == cluster].sum(0) for cluster in range(k)])
    sizes = np.bincount(labels, minlength=k).astype(np.float64)
    result: NDArray[np.float64] = (sums @ sums.T) / np.outer(sizes, sizes)
    own = np.divide((sums**2).sum(1) - sizes, sizes * (sizes - 1), out=np.ones(k), where=sizes > 1)
    np.fill_diagonal(result, own)
    return result
