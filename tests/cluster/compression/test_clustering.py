"""Clustering: balance, planted structure found again, and errors by a dense computation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.compression.balanced import balanced_assignment, random_balanced
from cluster.compression.clustering import _held_out_gains, adapter_errors, assign
from cluster.compression.jd_full import jd_full
from cluster.compression.sample import Sample, kind_of, sample_modules
from cluster.compression.stack import FactorStack, stack_factors
from tests.support.dense import Factors, dense, random_adapters, related_adapters

D_OUT, D_IN = 24, 30
Collection = dict[str, dict[int, Factors]]
"""Module -> adapter -> factors."""

few = settings(derandomize=True, max_examples=100, deadline=None)


pytestmark = pytest.mark.usefixtures("one_thread")


def sample_of(collection: Collection, num_adapters: int) -> Sample:
    stacks: dict[str, FactorStack] = {}
    for module, factors in collection.items():
        stack = stack_factors(sorted(factors.items(), key=lambda item: item[0]))
        assert stack is not None
        stacks[module] = stack
    return Sample.of(stacks, num_adapters)


def planted(
    groups: Sequence[int], rank: int, shared: int, seed: int, modules: Sequence[str] = ("q", "v")
) -> Collection:
    """Adapters of one group share their subspaces at every module; groups share nothing."""
    collection: Collection = {}
    for m, module in enumerate(modules):
        collection[module] = {}
        for group in sorted(set(groups)):
            members = [i for i, own in enumerate(groups) if own == group]
            related = related_adapters(len(members), rank, shared, D_OUT, D_IN, seed=1000 * seed + 10 * m + 100 * group)
            collection[module].update(zip(members, related, strict=True))
    return collection


def unstructured(num_adapters: int, seed: int, rank: int = 2) -> Collection:
    return {
        module: dict(enumerate(random_adapters([rank] * num_adapters, D_OUT, D_IN, seed=seed + 7 * m)))
        for m, module in enumerate(("q", "v"))
    }


def dense_mean_error(collection: Collection, labels: Sequence[int], rank: int, seed: int) -> float:
    """Mean over adapters of sum_m ||M - U U^T M V V^T||^2 / sum_m ||M||^2."""
    lost, total = np.zeros(len(labels)), np.zeros(len(labels))
    for factors in collection.values():
        for cluster in set(labels):
            members = [i for i in sorted(factors) if labels[i] == cluster]
            stack = stack_factors([(i, factors[i]) for i in members])
            if stack is None:
                continue
            basis = jd_full(stack, rank, seed)
            U, V = basis.U.double().numpy(), basis.V.double().numpy()
            for i in members:
                M = dense(factors[i])
                lost[i] += np.linalg.norm(M - U @ (U.T @ M @ V) @ V.T) ** 2
                total[i] += np.linalg.norm(M) ** 2
    return float(np.mean(lost / total))


def together(labels: Sequence[int] | NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N, N): who shares a cluster with whom, whatever the clusters are called."""
    labels = np.asarray(labels)
    return labels[:, None] == labels[None, :]


@st.composite
def gains_and_labels(draw: st.DrawFn) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    num_adapters = draw(st.integers(2, 24))
    k = draw(st.integers(2, num_adapters))
    # Few values: ties, and whole crowds that want the same cluster.
    values = draw(st.lists(st.integers(0, 3), min_size=num_adapters * k, max_size=num_adapters * k))
    labels = draw(st.lists(st.integers(0, k - 1), min_size=num_adapters, max_size=num_adapters))
    return np.array(values, dtype=np.float64).reshape(num_adapters, k), np.array(labels, dtype=np.int64)


@few
@given(gains_and_labels())
def test_assignment_is_balanced_and_leaves_nobody_out(case: tuple[NDArray[np.float64], NDArray[np.int64]]) -> None:
    gains, labels = case
    num_adapters, k = gains.shape
    before = gains.copy(), labels.copy()
    result = balanced_assignment(gains, labels)
    assert result.shape == (num_adapters,)
    sizes = np.bincount(result, minlength=k)
    assert len(sizes) == k
    assert sizes.min() >= 1
    assert sizes.max() <= math.ceil(1.25 * num_adapters / k)
    assert (gains == before[0]).all()
    assert (labels == before[1]).all()


@few
@given(num_adapters=st.integers(1, 60), data=st.data())
def test_random_split_is_even(num_adapters: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, num_adapters))
    sizes = np.bincount(random_balanced(num_adapters, k, np.random.default_rng(0)), minlength=k)
    assert len(sizes) == k
    assert sizes.sum() == num_adapters
    assert sizes.max() - sizes.min() <= 1


def test_everybody_gets_the_best_cluster_where_there_is_room() -> None:
    rng = np.random.default_rng(0)
    wanted = random_balanced(20, 4, rng)
    gains = rng.uniform(0, 0.5, (20, 4))
    gains[np.arange(20), wanted] += 0.6
    assert (balanced_assignment(gains, random_balanced(20, 4, rng)) == wanted).all()


def test_nobody_moves_where_all_gains_tie() -> None:
    labels = random_balanced(20, 4, np.random.default_rng(1))
    assert (balanced_assignment(np.full((20, 4), 0.3), labels) == labels).all()


def test_a_full_cluster_goes_to_those_who_have_most_to_lose() -> None:
    gains = np.array([[0.5 + 0.01 * i, 0.5] for i in range(8)])  # all want cluster 0, the last ones most
    result = balanced_assignment(gains, np.zeros(8, dtype=np.int64))
    assert result.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("num_adapters", "k", "shared"), [(24, 3, 4), (21, 3, 3), (32, 4, 4)])
def test_planted_groups_are_found_again(num_adapters: int, k: int, shared: int, seed: int) -> None:
    groups = np.random.default_rng(100 + seed).permutation(np.arange(num_adapters) % k)  # not assign's own split
    collection = planted(groups.tolist(), rank=2, shared=shared, seed=seed)
    found = assign(sample_of(collection, num_adapters), k, rank=shared, seed=seed)
    assert (together(found.labels) == together(groups)).all()
    assert found.error < found.random_error / 3
    assert found.error == pytest.approx(dense_mean_error(collection, found.labels.tolist(), shared, seed), abs=1e-6)
    assert found.random_error == pytest.approx(
        dense_mean_error(collection, found.random_labels.tolist(), shared, seed), abs=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_cluster_of_two_or_more_can_be_judged_by_everybody(seed: int) -> None:
    sample = sample_of(unstructured(12, seed), 12)
    labels = random_balanced(12, 5, np.random.default_rng(seed))
    # Exactly 0 is a cluster with nobody left to fit a basis.
    assert _held_out_gains(sample, labels, 5, 2, seed, np.random.default_rng(seed)).min() > 0


def test_adapters_that_touch_other_modules_than_most_are_placed_with_their_kin() -> None:
    groups = [i % 3 for i in range(24)]
    collection = planted(groups, rank=2, shared=4, seed=5, modules=("q", "k", "v"))
    for only_q_and_v in (0, 4, 8, 9):
        del collection["k"][only_q_and_v]
    for only_k in (7, 11):
        del collection["q"][only_k], collection["v"][only_k]
    found = assign(sample_of(collection, 24), 3, rank=4, seed=0)
    assert (together(found.labels) == together(groups)).all()


def test_an_adapter_that_no_sampled_module_shows_is_placed_all_the_same() -> None:
    collection = {module: dict(list(factors.items())[:9]) for module, factors in unstructured(10, seed=3).items()}
    found = assign(sample_of(collection, 10), 3, rank=3, seed=0)
    assert found.labels.shape == (10,)
    assert np.bincount(found.labels, minlength=3).min() >= 1


def test_mean_error_weighs_modules_by_each_adapters_own_energy() -> None:
    collection = unstructured(10, seed=4)
    for i, scale in ((0, 1e-3), (1, 30.0), (2, 1e6)):
        A, B = collection["q"][i]
        collection["q"][i] = (A, B * scale)
    del collection["v"][3], collection["q"][4]
    sample = sample_of(collection, 10)
    np.testing.assert_allclose(sample.weights.sum(1), 1)
    energy = [np.linalg.norm(dense(collection[module][1])) ** 2 for module in ("q", "v")]
    np.testing.assert_allclose(sample.weights[1], np.array(energy) / sum(energy))
    assert sample.weights[3].tolist() == [1, 0]
    assert sample.weights[4].tolist() == [0, 1]
    labels = random_balanced(10, 3, np.random.default_rng(2))
    assert adapter_errors(sample, labels, 3, seed=7).mean() == pytest.approx(
        dense_mean_error(collection, labels.tolist(), 3, seed=7), abs=1e-6
    )


def test_mean_error_is_not_below_zero_where_nothing_is_lost() -> None:
    for seed in range(8):
        error = adapter_errors(sample_of(unstructured(6, seed), 6), np.zeros(6, dtype=np.int64), 12, seed).mean()
        assert 0 <= error < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_an_unstructured_collection_stays_spread_and_never_ends_worse_than_random(seed: int) -> None:
    collection = unstructured(14, seed)
    # Sizes over twelve orders of magnitude: what made plain k-means collapse.
    for factors in collection.values():
        for i, (A, B) in factors.items():
            factors[i] = (A, B * 10.0 ** (i - 7))
    sample = sample_of(collection, 14)
    found = assign(sample, 4, rank=4, seed=seed)
    sizes = np.bincount(found.labels, minlength=4)
    assert sizes.min() >= 1
    assert sizes.max() <= math.ceil(1.25 * 14 / 4)
    assert found.error <= found.random_error
    assert found.error == pytest.approx(dense_mean_error(collection, found.labels.tolist(), 4, seed), abs=1e-6)
    assert (found.start == "random, unimproved") == (found.error == found.random_error)
    random_sizes = np.bincount(found.random_labels, minlength=4)
    assert random_sizes.max() - random_sizes.min() <= 1
    assert found.random_error == adapter_errors(sample, found.random_labels, 4, seed).mean()


def test_identical_adapters_stay_balanced() -> None:
    factors = random_adapters([2], D_OUT, D_IN, seed=1)[0]
    found = assign(sample_of({"q": dict.fromkeys(range(11), factors)}, 11), 3, rank=2, seed=0)
    assert np.bincount(found.labels, minlength=3).min() >= 1
    assert np.bincount(found.labels, minlength=3).max() <= 5
    assert found.error < 1e-6


def test_assignment_is_the_same_again_and_follows_the_seed() -> None:
    def run(seed: int) -> object:
        found = assign(sample_of(unstructured(12, seed=2), 12), 3, rank=3, seed=seed)
        return found.labels.tolist(), found.error, found.random_labels.tolist(), found.random_error, found.start

    np.random.seed(1)
    first = run(5)
    np.random.seed(2)
    assert run(5) == first
    assert run(6) != first


def test_one_cluster_holds_everybody() -> None:
    collection = unstructured(9, seed=6)
    found = assign(sample_of(collection, 9), 1, rank=4, seed=0)
    assert found.labels.tolist() == [0] * 9
    assert found.error == found.random_error
    assert found.error == pytest.approx(dense_mean_error(collection, [0] * 9, 4, seed=0), abs=1e-6)


def test_as_many_clusters_as_adapters_is_everyones_own_truncated_svd() -> None:
    collection = unstructured(7, seed=8, rank=5)
    found = assign(sample_of(collection, 7), 7, rank=2, seed=0)
    assert sorted(found.labels.tolist()) == list(range(7))
    lost, total = np.zeros(7), np.zeros(7)
    for factors in collection.values():
        for i, pair in factors.items():
            energies = np.linalg.svd(dense(pair), compute_uv=False) ** 2
            lost[i] += energies[2:].sum()
            total[i] += energies.sum()
    assert found.error == pytest.approx(np.mean(lost / total), abs=2e-3)


@few
@given(
    depths=st.dictionaries(st.sampled_from(["self_attn.q_proj", "mlp.up_proj", "x"]), st.integers(1, 40), min_size=1),
    per_kind=st.integers(1, 5),
)
def test_sampled_modules_cover_every_kind_and_the_whole_depth(depths: dict[str, int], per_kind: int) -> None:
    modules = [
        f"model.layers.{layer}.{name}"
        for layer in range(max(depths.values()))
        for name, depth in depths.items()
        if layer < depth
    ]
    chosen = sample_modules(modules, per_kind)
    assert set(chosen) <= set(modules)
    assert len(set(chosen)) == len(chosen)
    for name, depth in depths.items():
        layers = [int(module.split(".")[2]) for module in chosen if module.endswith("." + name)]
        count = min(per_kind, depth)
        assert len(layers) == count
        # The middles of equal bands, in whole layers.
        middles = (np.arange(count) + 0.5) * depth / count
        assert (np.abs(np.array(layers) + 0.5 - middles) <= 0.5).all()


def test_a_kind_is_a_name_without_the_layers_number() -> None:
    assert kind_of("model.layers.7.self_attn.q_proj") == "model.layers.*.self_attn.q_proj"
    assert kind_of("model.layers.7.mlp.experts.31.w1") == "model.layers.*.mlp.experts.*.w1"
    assert kind_of("lm_head") == "lm_head"


def test_those_that_come_later_join_clusters_as_they_stand() -> None:
    """A few with a sure place go there, whoever is there already; a full cluster takes none."""
    standing = np.array([6, 6, 6, 6])
    gains = np.array([[0.1, 0.9, 0.2, 0.3], [0.1, 0.8, 0.2, 0.3]])
    assert balanced_assignment(gains, gains.argmax(1), standing).tolist() == [1, 1]
    full = np.array([6, 10, 6, 6])
    assert balanced_assignment(gains, gains.argmax(1), full).tolist() == [3, 3]
    assert standing.tolist() == [6, 6, 6, 6]


def test_one_cluster_takes_everybody() -> None:
    assert balanced_assignment(np.ones((3, 1)), np.zeros(3, dtype=np.int64)).tolist() == [0, 0, 0]
