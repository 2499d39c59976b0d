"""Method, number of clusters and rank, chosen: the fewest resident bytes whose mean error meets a target.

The paper's way: by reconstruction error alone, on a few modules of every kind. For plain SVD the error is known
exactly from the spectra; its bytes bound what is worth trying for a shared basis, and for each number of
clusters the smallest rank that meets the target is found by bisection (the error falls with the rank).

Legend: N adapters, M modules, k clusters, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.adapters.record import AdapterRecord
from cluster.compression.balanced import Labels, balanced_kmeans, random_balanced
from cluster.compression.clustering import adapter_errors, joint_features
from cluster.compression.sample import Sample
from cluster.layer import ModuleShape

_FEATURE_RANK = 16


@dataclass(frozen=True)
class Choice:
    """``error``: mean squared relative error over the adapters, exact for svd, else estimated on the sample.
    ``size_bytes``: of the tensors that must be resident."""

    method: str
    clusters: int
    rank: int
    size_bytes: int
    error: float


@dataclass(frozen=True)
class CollectionShape:
    """``ranks`` (N, M): each adapter's rank at each module, 0 where it does not touch it. ``sides`` (M, 2):
    d_out and d_in. ``itemsize``: bytes of a stored number."""

    ranks: NDArray[np.int64]
    sides: NDArray[np.int64]
    itemsize: int

    @staticmethod
    def of(records: Sequence[AdapterRecord], modules: Mapping[str, ModuleShape], itemsize: int) -> CollectionShape:
        """``modules`` are the base's; those that no adapter touches are left out."""
        touched = {module for record in records for module in record.modules}
        used = [module for module in modules if module in touched]
        ranks = np.zeros((len(records), len(used)), dtype=np.int64)
        for i, record in enumerate(records):
            for m, module in enumerate(used):
                places = record.modules.get(module)
                ranks[i, m] = places.rank if places is not None and places.energy > 0 else 0
        sides = np.array([(modules[module].d_out, modules[module].d_in) for module in used], dtype=np.int64)
        return CollectionShape(ranks, sides, itemsize)

    def repeated(self, num_adapters: int) -> CollectionShape:
        """Of ``num_adapters`` adapters like these, over and over."""
        return replace(self, ranks=np.resize(self.ranks, (num_adapters, self.ranks.shape[1])))

    def joint_bytes(self, labels: Labels, rank: int, diagonal: bool) -> int:
        """Of all bases and cores, with each side's rank bounded as ``jd_full`` and ``jd_diag`` bound it."""
        k = int(labels.max()) + 1
        members = np.eye(k, dtype=np.int64)[labels]  # (N, k)
        stacked = members.T @ self.ranks  # (k, M): sum of ranks
        r_U = np.minimum(np.minimum(rank, stacked), self.sides[:, 0])
        r_V = np.minimum(np.minimum(rank, stacked), self.sides[:, 1])
        if diagonal:
            r_U = r_V = np.minimum(rank, stacked)
        cores = members.sum(0)[:, None] * (r_U if diagonal else r_U * r_V)
        numbers = r_U * self.sides[:, 0] + r_V * self.sides[:, 1] + cores
        return int(numbers.sum()) * self.itemsize

    def cluster_bytes(self, rank: int, diagonal: bool, num_served: int) -> int:
        """Of one basis that all these adapters were fitted on, and of the cores of the ``num_served`` of them that are
        served from it."""
        both = self.joint_bytes(np.zeros(len(self.ranks), dtype=np.int64), rank, diagonal)
        stacked = self.ranks.sum(0)
        r_U, r_V = (np.minimum(np.minimum(rank, stacked), side) for side in self.sides.T)
        core = int((np.minimum(rank, stacked) if diagonal else r_U * r_V).sum()) * self.itemsize
        return both - (len(self.ranks) - num_served) * core

    def svd_bytes(self, rank: int) -> int:
        """Of every adapter's factors, cut to ``rank``."""
        return int((np.minimum(rank, self.ranks) * self.sides.sum(1)).sum()) * self.itemsize


def choose_svd(shape: CollectionShape, spectra: Sequence[Sequence[Sequence[float]]], target: float) -> list[Choice]:
    """Plain truncation at every rank up to the smallest that meets the target; that one is last.

    ``spectra[i][m]``: squared singular values, descending, of adapter i at each module it touches.
    """
    tails = [np.zeros(int(shape.ranks.max()) + 1) for _ in spectra]
    for tail, modules in zip(tails, spectra, strict=True):
        for spectrum in modules:
            tail[: len(spectrum)] += np.cumsum(np.asarray(spectrum)[::-1])[::-1]
        tail /= tail[0]
    weighed = []
    for rank in range(1, len(tails[0])):
        error = float(np.mean([tail[rank] for tail in tails]))
        weighed.append(Choice("svd", 0, rank, shape.svd_bytes(rank), error))
        if error <= target:
            break
    return weighed


def cluster_counts(num_adapters: int) -> list[int]:
    """Numbers of clusters worth trying: 1 and up to half the adapters, in steps of about the square root of 2."""
    counts, step = [1], 2
    while step <= num_adapters // 2:
        counts += [step] + ([step * 3 // 2] if step * 3 // 2 <= num_adapters // 2 else [])
        step *= 2
    return sorted(set(counts))


def candidate_labels(sample: Sample, num_clusters: int, seed: int) -> list[Labels]:
    """A random balanced split, and k-means on joint cores: quick to have, and near what ``assign`` ends with."""
    rng = np.random.default_rng(seed)
    labels = [random_balanced(sample.num_adapters, num_clusters, rng)]
    if 1 < num_clusters < sample.num_adapters:
        labels.append(balanced_kmeans(joint_features(sample, _FEATURE_RANK, seed), num_clusters, rng))
    return labels


def choose_rank(
    sample: Sample,
    shape: CollectionShape,
    candidates: Sequence[Labels],
    method: str,
    ranks: range,
    target: float,
    max_bytes: int,
    seed: int,
) -> list[Choice]:
    """What was weighed for one method and one number of clusters: the smallest of ``ranks`` that meets the target
    within ``max_bytes`` is last, if there is one. ``candidates``: labels, of which the better are taken."""
    diagonal = method == "jd-diag"
    affordable = [rank for rank in ranks if shape.joint_bytes(candidates[0], rank, diagonal) <= max_bytes]
    if not affordable:
        return []
    errors: dict[int, float] = {}

    def error(labels: Labels, rank: int) -> float:
        return float(adapter_errors(sample, labels, rank, seed, method).mean())

    def meets(rank: int) -> bool:
        if rank not in errors:
            errors[rank] = error(labels, rank)
        return errors[rank] <= target

    # First at the largest rank: where that misses the target, no more of this number of clusters need be tried.
    at_most = [error(labels, affordable[-1]) for labels in candidates]
    labels = candidates[int(np.argmin(at_most))]
    errors[affordable[-1]] = min(at_most)
    found = _first(affordable, meets)
    order = [rank for rank in sorted(errors) if rank != found] + ([] if found is None else [found])
    k = int(labels.max()) + 1
    return [Choice(method, k, rank, shape.joint_bytes(labels, rank, diagonal), errors[rank]) for rank in order]


def best_choice(weighed: Sequence[Choice], target: float) -> Choice | None:
    """The fewest bytes that meet the target; of equal bytes the least error."""
    meeting = [choice for choice in weighed if choice.error <= target]
    return min(meeting, key=lambda choice: (choice.size_bytes, choice.error), default=None)


def _first(ranks: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The smallest of ``ranks`` for which ``holds``, which is false up to some rank and true from it on."""
    if not holds(ranks[-1]):
        return None
    low, high = 0, len(ranks) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ranks[middle]) else (middle + 1, high)
    return ranks[low]
