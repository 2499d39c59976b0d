"""Labels of clusters of nearly equal size: at random, by gains, by k-means."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_BALANCE = 1.25  # a cluster holds at most ceil(1.25 N / k) adapters
_KMEANS_ITERATIONS = 20

Labels = NDArray[np.int64]
"""(N,): each adapter's cluster, 0 .. k-1."""


def random_balanced(num_adapters: int, num_clusters: int, rng: np.random.Generator) -> Labels:
    """Sizes differ by at most one."""
    return rng.permutation(np.arange(num_adapters, dtype=np.int64) % num_clusters)


def balanced_assignment(
    gains: NDArray[np.float64], labels: Labels, standing: NDArray[np.int64] | None = None
) -> Labels:
    """Each adapter to the cluster of highest gain that has room, those with most to lose first; where gains
    tie it stays. No cluster is left empty. gains (N, k), labels (N,) the present ones; ``standing`` (k,): how many
    others are in each cluster already, and stay there."""
    num_adapters, k = gains.shape
    if k == 1:
        return np.zeros(num_adapters, dtype=np.int64)
    sizes = np.zeros(k, dtype=np.int64) if standing is None else standing.copy()
    capacity = math.ceil(_BALANCE * (num_adapters + int(sizes.sum())) / k)
    preferred = gains.copy()
    preferred[np.arange(num_adapters), labels] += 1e-9
    ordered = np.sort(preferred, axis=1)
    regret = ordered[:, -1] - ordered[:, -2]
    result = np.full(num_adapters, -1, dtype=np.int64)
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
