"""The automatic choice: bytes and errors against dense computations, the search against trying everything."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from cluster.compression.balanced import random_balanced
from cluster.compression.choose import (
    Choice,
    CollectionShape,
    best_choice,
    candidate_labels,
    choose_rank,
    choose_svd,
    cluster_counts,
)
from cluster.compression.clustering import adapter_errors, assign_apart, share_clusters, similarity
from cluster.compression.sample import Sample
from cluster.compression.stack import stack_factors
from tests.support.dense import Factors, dense, random_adapters, related_adapters, stack_of

D_OUT, D_IN, RANK = 20, 28, 3


pytestmark = pytest.mark.usefixtures("one_thread")


def two_modules(count: int, seed: int) -> list[list[Factors]]:
    return [related_adapters(count, RANK, 6, D_OUT, D_IN, seed), random_adapters([RANK] * count, D_OUT, D_IN, seed + 1)]


def shape_of(modules: list[list[Factors]]) -> CollectionShape:
    ranks = np.array([[A.shape[0] for A, _ in adapters] for adapters in modules], dtype=np.int64).T
    sides = np.array([(B.shape[0], A.shape[1]) for (A, B), *_ in modules], dtype=np.int64)
    return CollectionShape(ranks, sides, itemsize=2)


def sample_of(modules: list[list[Factors]]) -> Sample:
    return Sample.of({str(m): stack_of(adapters) for m, adapters in enumerate(modules)}, len(modules[0]))


def test_svd_is_weighed_by_its_exact_error_and_bytes_up_to_the_rank_that_meets_the_target() -> None:
    modules = two_modules(5, seed=1)
    matrices = [[dense(module[i]) for module in modules] for i in range(5)]
    values = [[np.linalg.svd(M, compute_uv=False)[:RANK] ** 2 for M in adapter] for adapter in matrices]
    weighed = choose_svd(shape_of(modules), [[v.tolist() for v in adapter] for adapter in values], target=0.2)
    for choice in weighed:
        lost = [sum(v[choice.rank :].sum() for v in adapter) / sum(v.sum() for v in adapter) for adapter in values]
        assert choice.error == pytest.approx(np.mean(lost), abs=1e-6)
        assert choice.size_bytes == 2 * 5 * len(modules) * choice.rank * (D_OUT + D_IN)
    assert [choice.error <= 0.2 for choice in weighed] == [False] * (len(weighed) - 1) + [True]


def test_joint_bytes_are_those_of_the_tensors_with_each_side_bounded() -> None:
    shape = CollectionShape(np.array([[2, 2], [2, 0], [4, 4]]), np.array([[3, 10], [8, 8]]), itemsize=2)
    labels = np.array([0, 0, 1])
    # Rank 5: cluster 0 stacks 4 rows at the first module and 2 at the second, cluster 1 four at both.
    expected = 3 * 3 + 10 * 4 + 2 * 3 * 4  # cluster 0, first module: U side bounded by d_out = 3, two cores
    expected += 8 * 2 + 8 * 2 + 2 * 2 * 2
    expected += 3 * 3 + 10 * 4 + 3 * 4
    expected += 8 * 4 + 8 * 4 + 4 * 4
    assert shape.joint_bytes(labels, 5, diagonal=False) == 2 * expected


@pytest.mark.parametrize("target", [0.1, 0.3, 0.6])
def test_the_smallest_rank_that_meets_the_target_is_found(target: float) -> None:
    modules = two_modules(8, seed=2)
    sample, shape = sample_of(modules), shape_of(modules)
    labels = random_balanced(8, 2, np.random.default_rng(0))
    found = choose_rank(sample, shape, [labels], "jd-full", range(1, 13), target, 10**9, seed=0)[-1]
    errors = {rank: adapter_errors(sample, labels, rank, 0).mean() for rank in range(1, 13)}
    assert found.rank == min(rank for rank, error in errors.items() if error <= target)
    assert found.error == pytest.approx(errors[found.rank])
    assert found.size_bytes == shape.joint_bytes(labels, found.rank, diagonal=False)


def test_where_the_largest_affordable_rank_misses_the_target_one_measurement_is_all() -> None:
    modules = two_modules(8, seed=3)
    shape = shape_of(modules)
    labels = candidate_labels(sample_of(modules), 4, seed=0)
    weighed = choose_rank(sample_of(modules), shape, labels, "jd-full", range(1, 13), 0.01, 1500, seed=0)
    assert len(weighed) == 1
    assert weighed[0].size_bytes <= 1500
    assert best_choice(weighed, 0.01) is None


def test_fewest_bytes_that_meet_the_target_win_whatever_the_method() -> None:
    choices = [
        Choice("svd", 0, 2, 900, 0.05),
        Choice("jd-full", 2, 8, 700, 0.11),
        Choice("jd-full", 3, 9, 800, 0.10),
        Choice("jd-diag", 3, 9, 850, 0.02),
    ]
    assert best_choice(choices, 0.1) == choices[2]
    assert best_choice(choices, 0.04) == choices[3]
    assert best_choice(choices, 0.01) is None


def test_numbers_of_clusters_worth_trying_rise_by_less_than_a_half_each() -> None:
    counts = cluster_counts(1000)
    assert counts[0] == 1
    assert 250 < counts[-1] <= 500
    assert all(b / a <= 2 if a == 1 else b / a <= 1.5 for a, b in pairwise(counts))


def test_a_module_stands_for_its_kind_so_that_the_sample_estimates_the_whole() -> None:
    """Two kinds of very unequal energy, one module sampled of each: the estimate is of all modules."""
    heavy = related_adapters(6, RANK, 4, D_OUT, D_IN, seed=4)
    light = random_adapters([RANK] * 6, D_OUT, D_IN, seed=5)
    energies = [np.array([float(np.square(dense(f)).sum()) for f in kind]) for kind in (heavy, light)]
    stacks = {"layers.0.q": stack_of(heavy), "layers.0.v": stack_of(light)}
    labels = np.zeros(6, dtype=np.int64)
    # Nine layers alike of q, one of v.
    sample = Sample.of(stacks, 6, {"layers.*.q": 9 * energies[0], "layers.*.v": energies[1]})
    alone = [adapter_errors(Sample.of({name: stack}, 6), labels, 4, 0) for name, stack in stacks.items()]
    expected = (9 * energies[0] * alone[0] + energies[1] * alone[1]) / (9 * energies[0] + energies[1])
    assert adapter_errors(sample, labels, 4, 0) == pytest.approx(expected, rel=1e-6)


def test_tenants_never_share_a_cluster_and_each_has_one() -> None:
    modules = two_modules(11, seed=6)
    tenants = ["b"] * 6 + ["a"] * 4 + [""]
    found = assign_apart(sample_of(modules), tenants, 5, 4, seed=0)
    owners = [{tenants[i] for i in np.flatnonzero(found.labels == cluster)} for cluster in range(5)]
    assert all(len(owner) == 1 for owner in owners)
    assert set.union(*owners) == {"a", "b", ""}
    assert found.errors == pytest.approx(adapter_errors(sample_of(modules), found.labels, 4, 0), abs=1e-6)


def test_more_tenants_than_clusters_get_a_cluster_each() -> None:
    assert share_clusters([3, 1, 5], 2) == [1, 1, 1]
    assert share_clusters([3, 1, 8], 5) == [1, 1, 3]
    assert share_clusters([2, 2], 9) == [2, 2]


def test_similarity_is_the_mean_cosine_over_pairs() -> None:
    rng = np.random.default_rng(7)
    features = rng.normal(size=(7, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = np.array([0, 1, 0, 1, 0, 2, 1])
    found = similarity(features, labels)
    for a in range(3):
        for b in range(3):
            pairs = [
                float(features[i] @ features[j])
                for i in np.flatnonzero(labels == a)
                for j in np.flatnonzero(labels == b)
                if i != j
            ]
            assert found[a, b] == pytest.approx(np.mean(pairs) if pairs else 1.0)


def test_a_sample_of_some_adapters_is_the_sample_of_them_alone() -> None:
    modules = two_modules(6, seed=8)
    chosen = [1, 2, 4]
    selected = sample_of(modules).select(chosen)
    stacks = {}
    for m, adapters in enumerate(modules):
        stack = stack_factors([(number, adapters[i]) for number, i in enumerate(chosen)])
        assert stack is not None
        stacks[str(m)] = stack
    alone = Sample.of(stacks, 3)
    labels = np.zeros(3, dtype=np.int64)
    assert adapter_errors(selected, labels, 4, 0) == pytest.approx(adapter_errors(alone, labels, 4, 0), abs=1e-5)
    assert selected.weights == pytest.approx(alone.weights)
