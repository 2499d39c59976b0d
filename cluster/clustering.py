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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.adapter import AdapterRecord
from cluster.factors import FactorStack
from cluster.jd import Basis, captured_energy, jd_full, relative_errors, unit_cores
from cluster.methods import METHODS

MAX_ROUNDS = 6
_BALANCE = 1.25  # a cluster holds at most ceil(1.25 N / k) adapters
_KMEANS_ITERATIONS = 20

Labels = NDArray[np.int64]
"""(N,): each adapter's cluster, 0 .. k-1."""


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


@dataclass(frozen=True)
class Sample:
    """Stacks of the sampled modules, and what each stands for in each adapter's error: weights (N, modules)
    whose rows sum to 1, 0 where it does not touch the module."""

    stacks: tuple[FactorStack, ...]
    weights: NDArray[np.float64]

    @staticmethod
    def of(
        stacks: Mapping[str, FactorStack],
        num_adapters: int,
        kind_energies: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> Sample:
        """``kind_energies``: kind of module -> the adapters' energy in all modules of that kind (N,). With it a
        module stands for its kind, so that the sample's errors estimate those over all modules; without, each
        stands for itself."""
        energies = np.zeros((num_adapters, len(stacks)))
        for m, stack in enumerate(stacks.values()):
            energies[list(stack.members), m] = stack.norms.square().numpy()
        if kind_energies is not None:
            kinds = np.array([kind_of(module) for module in stacks])
            for kind in np.unique(kinds):
                of_kind = energies[:, kinds == kind]
                scale = _divide(kind_energies[str(kind)][:, None], of_kind.sum(1, keepdims=True))
                energies[:, kinds == kind] = of_kind * scale
        return Sample(tuple(stacks.values()), _divide(energies, energies.sum(1, keepdims=True)))

    @property
    def num_adapters(self) -> int:
        return len(self.weights)

    def select(self, adapters: Sequence[int]) -> Sample:
        """The sample of ``adapters`` alone, renumbered 0, 1, ..."""
        new_number = {adapter: number for number, adapter in enumerate(adapters)}
        stacks, kept = [], []
        for m, stack in enumerate(self.stacks):
            positions = [i for i, member in enumerate(stack.members) if member in new_number]
            if positions:
                own = stack.select(positions)
                stacks.append(replace(own, members=tuple(new_number[member] for member in own.members)))
                kept.append(m)
        return Sample(tuple(stacks), self.weights[np.ix_(list(adapters), kept)])


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


def random_balanced(num_adapters: int, num_clusters: int, rng: np.random.Generator) -> Labels:
    """Sizes differ by at most one."""
    return rng.permutation(np.arange(num_adapters, dtype=np.int64) % num_clusters)


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


def balanced_kmeans(features: NDArray[np.float64], k: int, rng: np.random.Generator) -> Labels:
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


def _divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where the denominator is."""
    out = np.zeros(np.broadcast(numerator, denominator).shape)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


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


def kind_energies(records: Sequence[AdapterRecord]) -> dict[str, NDArray[np.float64]]:
    """Kind of module -> the adapters' energies in all modules of that kind (N,)."""
    energies: dict[str, NDArray[np.float64]] = {}
    for i, record in enumerate(records):
        for module, places in record.modules.items():
            energies.setdefault(kind_of(module), np.zeros(len(records)))[i] += places.energy
    return energies


def kind_of(module: str) -> str:
    """``model.layers.7.self_attn.q_proj`` -> ``model.layers.*.self_attn.q_proj``"""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
