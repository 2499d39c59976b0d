"""Which adapters share a basis: one balanced cluster per adapter over all modules.

Works on a sample of modules. Several starts (a seeded random balanced split, k-means on the cores of one
joint basis, another random split), each improved by moving adapters to the cluster that captures them best;
the lowest total error wins, and the plain random split's error stands beside it: a clustering that is no
better than random is not presented as one.

Trap: after a fit every adapter's own cluster looks best, because it was fitted on it. So moves are judged by
bases that the adapter had no part in: each cluster is fitted on half of its adapters, the other half is judged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.factors import FactorStack
from cluster.jd import Basis, captured_energy, jd_full, unit_cores

MAX_ROUNDS = 6
_BALANCE = 1.25  # a cluster holds at most ceil(1.25 N / k) adapters
_KMEANS_ITERATIONS = 20

Labels = NDArray[np.int64]
"""(N,): each adapter's cluster, 0 .. k-1."""


@dataclass(frozen=True)
class Assignment:
    """``error`` and ``random_error`` are mean adapter errors over the sampled modules, with orthonormal bases;
    ``start`` names the start that won."""

    labels: Labels
    error: float
    random_labels: Labels
    random_error: float
    start: str


@dataclass(frozen=True)
class Sample:
    """Stacks of the sampled modules, and each adapter's share of its own energy at each: weights (N, modules)
    whose rows sum to 1, 0 where it does not touch the module."""

    stacks: tuple[FactorStack, ...]
    weights: NDArray[np.float64]

    @staticmethod
    def of(stacks: Mapping[str, FactorStack], num_adapters: int) -> Sample:
        energies = np.zeros((num_adapters, len(stacks)))
        for m, stack in enumerate(stacks.values()):
            energies[list(stack.members), m] = stack.norms.square().numpy()
        totals = energies.sum(1, keepdims=True)
        return Sample(
            tuple(stacks.values()), np.divide(energies, totals, out=np.zeros_like(energies), where=totals > 0)
        )

    @property
    def num_adapters(self) -> int:
        return len(self.weights)


def assign(sample: Sample, num_clusters: int, rank: int, seed: int) -> Assignment:
    """Balanced labels of least mean error among all starts. Deterministic in its arguments.

    ``num_clusters`` must not exceed the number of adapters; no cluster comes out empty.
    """
    assert 1 <= num_clusters <= sample.num_adapters
    rng = np.random.default_rng(seed)
    random_labels = random_balanced(sample.num_adapters, num_clusters, rng)
    random_error = mean_error(sample, random_labels, rank, seed)
    if num_clusters == 1 or num_clusters == sample.num_adapters:
        return Assignment(random_labels, random_error, random_labels, random_error, "only one way")
    starts = {
        "random": random_labels,
        "k-means on joint cores": _kmeans_balanced(_joint_features(sample, rank, seed), num_clusters, rng),
        "second random": random_balanced(sample.num_adapters, num_clusters, rng),
    }
    best = Assignment(random_labels, random_error, random_labels, random_error, "random, unimproved")
    for name, labels in starts.items():
        labels, error = _improve(sample, labels, rank, seed, rng)
        if error < best.error:
            best = Assignment(labels, error, random_labels, random_error, name)
    return best


def one_cluster(num_adapters: int) -> Assignment:
    """Everybody together: nothing to choose, nothing to measure (the errors are NaN)."""
    labels = np.zeros(num_adapters, dtype=np.int64)
    return Assignment(labels, math.nan, labels, math.nan, "one cluster")


def random_balanced(num_adapters: int, num_clusters: int, rng: np.random.Generator) -> Labels:
    """Sizes differ by at most one."""
    return rng.permutation(np.arange(num_adapters, dtype=np.int64) % num_clusters)


def mean_error(sample: Sample, labels: Labels, rank: int, seed: int) -> float:
    """Mean over adapters of sum_m ||M - M^||^2 / sum_m ||M||^2, each cluster fitted on all its adapters."""
    captured = np.zeros(sample.num_adapters)
    for m, stack in enumerate(sample.stacks):
        for members, basis in _fit(stack, labels, rank, seed).values():
            own = stack.select(members)
            captured[list(own.members)] += sample.weights[list(own.members), m] * captured_energy(own, basis).numpy()
    return float(np.mean((1 - captured).clip(min=0)))


def _fit(stack: FactorStack, labels: Labels, rank: int, seed: int) -> dict[int, tuple[list[int], Basis]]:
    """Cluster -> (its positions in the stack, its basis), for clusters that have adapters there."""
    member_labels = labels[list(stack.members)]
    fitted = {}
    for cluster in np.unique(member_labels[member_labels >= 0]):
        positions = np.flatnonzero(member_labels == cluster).tolist()
        fitted[int(cluster)] = (positions, jd_full(stack.select(positions), rank, seed))
    return fitted


def _improve(sample: Sample, labels: Labels, rank: int, seed: int, rng: np.random.Generator) -> tuple[Labels, float]:
    """Move adapters by held-out gains until the error stops falling; the best labels seen and their error."""
    k = int(labels.max()) + 1
    best, best_error = labels, mean_error(sample, labels, rank, seed)
    for _ in range(MAX_ROUNDS):
        gains = _held_out_gains(sample, labels, k, rank, seed, rng)
        moved = balanced_assignment(gains, labels)
        if (moved == labels).all():
            break
        labels, error = moved, mean_error(sample, moved, rank, seed)
        if error >= best_error:
            break
        best, best_error = labels, error
    return best, best_error


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


def balanced_assignment(gains: NDArray[np.float64], labels: Labels) -> Labels:
    """Each adapter to the cluster of highest gain that has room, those with most to lose first; where gains
    tie it stays. No cluster is left empty. gains (N, k), labels (N,) the present ones."""
    num_adapters, k = gains.shape
    capacity = math.ceil(_BALANCE * num_adapters / k)
    preferred = gains.copy()
    preferred[np.arange(num_adapters), labels] += 1e-9
    ordered = np.sort(preferred, axis=1)
    regret = ordered[:, -1] - ordered[:, -2]
    result = np.full(num_adapters, -1, dtype=np.int64)
    sizes = np.zeros(k, dtype=np.int64)
    for adapter in np.argsort(-regret, kind="stable"):
        cluster = next(c for c in np.argsort(-preferred[adapter], kind="stable") if sizes[c] < capacity)
        result[adapter] = cluster
        sizes[cluster] += 1
    for empty in np.flatnonzero(sizes == 0):
        # Whoever loses least by leaving a cluster of several.
        loss = preferred[np.arange(num_adapters), result] - preferred[:, empty]
        loss[sizes[result] < 2] = np.inf
        adapter = int(np.argmin(loss))
        sizes[result[adapter]] -= 1
        result[adapter], sizes[empty] = empty, 1
    return result


def _joint_features(sample: Sample, rank: int, seed: int) -> NDArray[np.float64]:
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


def _kmeans_balanced(features: NDArray[np.float64], k: int, rng: np.random.Generator) -> Labels:
    """k-means on unit vectors by cosine, with k-means++ seeding and balanced assignment."""
    centres = features[[int(rng.integers(len(features)))]]
    while len(centres) < k:
        distance = (1 - (features @ centres.T).max(1)).clip(1e-9)
        centres = np.concatenate([centres, features[[int(rng.choice(len(features), p=distance / distance.sum()))]]])
    labels = balanced_assignment(features @ centres.T, np.zeros(len(features), dtype=np.int64))
    for _ in range(_KMEANS_ITERATIONS):
        sums = np.stack([features[labels == cluster].sum(0) for cluster in range(k)])
        centres = sums / np.linalg.norm(sums, axis=1, keepdims=True).clip(1e-12)
        moved = balanced_assignment(features @ centres.T, labels)
        if (moved == labels).all():
            break
        labels = moved
    return labels


def sample_modules(modules: list[str], per_kind: int = 3) -> list[str]:
    """A few modules of every kind, spread over the depth of the model.

    A kind is a module's name without its layer's number; ``modules`` in the model's order.
    """
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module), []).append(module)
    chosen = []
    for of_kind in kinds.values():
        count = min(per_kind, len(of_kind))
        chosen += [of_kind[(2 * i + 1) * len(of_kind) // (2 * count)] for i in range(count)]
    return chosen


def kind_of(module: str) -> str:
    """``model.layers.7.self_attn.q_proj`` -> ``model.layers.*.self_attn.q_proj``"""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
