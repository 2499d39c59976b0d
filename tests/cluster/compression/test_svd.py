"""Truncation, spectra and the baseline at equal bytes, against dense SVDs and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cluster.compression.svd import (
    components_at_equal_bytes,
    dominant_pairs,
    errors_at_equal_bytes,
    smallest_rank,
    spectra,
    svd_factors,
    truncate,
    truncate_all,
)
from tests.support.bundles import read_factors
from tests.support.dense import Dense, dense, random_adapters, stack_of
from tests.support.paths import ZOO

few = settings(derandomize=True, max_examples=60, deadline=None)


pytestmark = pytest.mark.usefixtures("one_thread")


def cut(M: Dense, rank: int) -> Dense:
    """The best approximation of ``rank``, densely."""
    U, s, Vt = np.linalg.svd(M, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]


@pytest.mark.parametrize(("d_out", "d_in", "R"), [(20, 31, 6), (31, 20, 1), (4, 31, 6), (20, 3, 6), (4, 3, 6)])
def test_factored_svd_is_the_thin_svd_of_the_product(d_out: int, d_in: int, R: int) -> None:
    A, B = random_adapters([R], d_out, d_in, seed=R)[0]
    U, s, V = svd_factors(A, B)
    p = min(R, d_out, d_in)
    assert (U.shape, s.shape, V.shape) == ((d_out, p), (p,), (d_in, p))
    M = dense((A, B))
    np.testing.assert_allclose(s.numpy(), np.linalg.svd(M, compute_uv=False)[:p], rtol=1e-10)
    np.testing.assert_allclose((U * s @ V.T).numpy(), M, atol=1e-10)
    for columns in (U, V):
        np.testing.assert_allclose((columns.T @ columns).numpy(), np.eye(p), atol=1e-12)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 31), (31, 20), (4, 31), (20, 3)])
@pytest.mark.parametrize("rank", [0, 1, 3, 6, 50])
def test_truncation_is_the_best_of_its_rank(d_out: int, d_in: int, rank: int) -> None:
    factors = random_adapters([6], d_out, d_in, seed=3)[0]
    A, B = truncate(*factors, rank)
    q = min(rank, 6, d_out, d_in)
    assert (A.shape, B.shape, A.dtype, B.dtype) == ((q, d_in), (d_out, q), torch.float32, torch.float32)
    M = dense(factors)
    np.testing.assert_allclose(dense((A, B)), cut(M, rank), atol=1e-6 * np.linalg.norm(M))
    save({"A": A, "B": B})  # raises where a tensor is not contiguous


def test_truncation_balances_its_factors() -> None:
    A, B = random_adapters([4], 20, 31, seed=4)[0]
    short_A, short_B = truncate(A * 1e12, B * 1e-12, 2)
    np.testing.assert_allclose(short_A.norm(dim=1), short_B.norm(dim=0), rtol=1e-5)
    np.testing.assert_allclose(dense((short_A, short_B)), cut(dense((A, B)), 2), atol=1e-4)


def test_spectra_are_dense_singular_values_squared() -> None:
    adapters = random_adapters((5, 1, 8, 3), 20, 31, seed=5)
    A, B = random_adapters([4], 20, 31, seed=6)[0]
    adapters.append((torch.cat([A, A]), torch.cat([B, B], dim=1)))  # rank 4 in 8 rows
    adapters.append((A * 1e12, B * 1e-3))
    seen = spectra(stack_of(adapters))
    assert [len(spectrum) for spectrum in seen] == [5, 1, 8, 3, 8, 4]
    for spectrum, factors in zip(seen, adapters, strict=True):
        expected = np.linalg.svd(dense(factors), compute_uv=False)[: len(spectrum)] ** 2
        assert spectrum.dtype == np.float64
        assert spectrum.min() >= 0
        assert (np.diff(spectrum) <= 0).all()
        np.testing.assert_allclose(spectrum, expected, atol=1e-6 * expected.sum())


def test_spectra_of_real_adapters_are_dense_singular_values_squared() -> None:
    module = "model.layers.10.self_attn.v_proj"
    adapters = [read_factors(ZOO / "adapters" / name)[module] for name in ("add", "city-country", "roman")]
    for spectrum, factors in zip(spectra(stack_of(adapters)), adapters, strict=True):
        expected = np.linalg.svd(dense(factors), compute_uv=False)[: len(spectrum)] ** 2
        np.testing.assert_allclose(spectrum, expected, atol=1e-6 * expected.sum())


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 31), (4, 31)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_stack_is_truncated_adapter_by_adapter(d_out: int, d_in: int, rank: int) -> None:
    adapters = random_adapters((3, 1, 3, 2), d_out, d_in, seed=8)
    stack = truncate_all(stack_of(adapters), rank)
    assert stack.ranks == tuple(min(rank, own) for own in (3, 1, 3, 2))
    starts = np.cumsum([0, *stack.ranks])
    for i, M in enumerate(map(dense, adapters)):
        A, B = (rows[starts[i] : starts[i + 1]].double().numpy() for rows in (stack.A, stack.B))
        np.testing.assert_allclose(B.T @ A, cut(M / np.linalg.norm(M), rank), atol=1e-6)
        own = stack.ranks[i]
        np.testing.assert_allclose(stack.gram_A[i, :own, :own], A @ A.T, atol=1e-5)
        np.testing.assert_allclose(stack.gram_B[i, :own, :own], B @ B.T, atol=1e-5)


@pytest.mark.parametrize(("d_out", "d_in"), [(20, 31), (4, 31)])
def test_dominant_pairs_are_singular_pairs_taken_by_what_the_earlier_ones_leave(d_out: int, d_in: int) -> None:
    adapters = random_adapters((5, 1, 8, 3), d_out, d_in, seed=7)
    adapters += adapters[:1]  # a copy: its pairs are never taken again
    U, V = dominant_pairs(stack_of(adapters), 9)
    assert U.shape == (d_out, 9)
    assert V.shape == (d_in, 9)
    left = []
    for M in map(dense, adapters):
        u, s, vt = np.linalg.svd(M / np.linalg.norm(M), full_matrices=False)
        left += [s[j] * np.outer(u[:, j], vt[j]).ravel() for j in range(len(s))]
    residual = np.stack(left)
    for u, v in zip(U.double().numpy().T, V.double().numpy().T, strict=True):
        best = int((residual**2).sum(1).argmax())
        np.testing.assert_allclose(np.outer(u, v).ravel(), left[best], atol=1e-5)
        direction = residual[best] / np.linalg.norm(residual[best])
        residual = residual - np.outer(residual @ direction, direction)


@pytest.mark.parametrize("gate", [0.0, 0.001, 0.03, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_smallest_rank_is_the_first_that_meets_the_gate(seed: int, gate: float) -> None:
    generator = np.random.default_rng(seed)
    Ms = []
    module_spectra = []
    for rank in (6, 2, 4):
        A, B = random_adapters([rank], 12, 15, seed=100 * seed + rank)[0]
        A = A * torch.from_numpy(generator.uniform(0.02, 1, (rank, 1))).float()
        Ms.append(dense((A, B)))
        module_spectra += spectra(stack_of([(A, B)]))

    def error(q: int) -> float:
        return sum(np.linalg.norm(M - cut(M, q)) ** 2 for M in Ms) / sum(np.linalg.norm(M) ** 2 for M in Ms)

    found, claimed = smallest_rank(module_spectra, gate)
    assert claimed == pytest.approx(error(found), abs=1e-6)
    assert error(found) <= gate + 1e-6
    assert found == 1 or error(found - 1) > gate


def test_smallest_rank_never_exceeds_the_largest_spectrum() -> None:
    assert smallest_rank([np.array([1.0]), np.array([4.0, 3.0, 2.0])], 0.0) == (3, 0.0)
    assert smallest_rank([np.array([1.0])], 0.0) == (1, 0.0)
    assert smallest_rank([np.array([4.0, 3.0, 0.0])], 0.0) == (2, 0.0)


# Integers tie often, and zeros end many spectra.
a_spectrum = st.lists(st.integers(0, 6), min_size=1, max_size=3).map(
    lambda values: np.array(sorted(values, reverse=True), dtype=np.float64)
)
some_adapters = st.dictionaries(
    st.sampled_from(["one", "two", "three"]),
    st.dictionaries(st.sampled_from(["q", "v"]), a_spectrum, min_size=1).filter(
        lambda modules: sum(spectrum.sum() for spectrum in modules.values()) > 0
    ),
    min_size=1,
)


# One dear component of q, or three cheap ones of v that weigh more together.
DEAR_AND_CHEAP = {"one": {"q": np.array([6.0]), "v": np.array([5.0, 5.0, 5.0])}}


def total_error(adapters: dict[str, dict[str, np.ndarray]], kept: dict[tuple[str, str], int]) -> float:
    """Sum over adapters of sum_m lost / sum_m all."""
    return sum(
        sum(spectrum[kept[adapter_id, module] :].sum() for module, spectrum in modules.items())
        / sum(spectrum.sum() for spectrum in modules.values())
        for adapter_id, modules in adapters.items()
    )


def best_by_brute_force(adapters: dict[str, dict[str, np.ndarray]], costs: dict[str, int], budget_bytes: int) -> float:
    owners = [(adapter_id, module) for adapter_id, modules in adapters.items() for module in modules]
    choices = itertools.product(*(range(len(adapters[a][m]) + 1) for a, m in owners))
    return min(
        total_error(adapters, dict(zip(owners, choice, strict=True)))
        for choice in choices
        if sum(count * costs[module] for count, (_, module) in zip(choice, owners, strict=True)) <= budget_bytes
    )


@few
@given(adapters=some_adapters, cost=st.integers(1, 5), budget_bytes=st.integers(0, 40))
def test_at_one_price_the_baseline_is_the_best_there_is(
    adapters: dict[str, dict[str, np.ndarray]], cost: int, budget_bytes: int
) -> None:
    costs = {"q": cost, "v": cost}
    kept = components_at_equal_bytes(adapters, costs, budget_bytes)
    assert total_error(adapters, kept) == pytest.approx(best_by_brute_force(adapters, costs, budget_bytes), abs=1e-9)


@few
@example(adapters=DEAR_AND_CHEAP, cost_q=7, cost_v=1, budget_bytes=7)
@given(adapters=some_adapters, cost_q=st.integers(1, 7), cost_v=st.integers(1, 7), budget_bytes=st.integers(0, 60))
def test_at_two_prices_the_baseline_is_the_best_there_is_up_to_one_component(
    adapters: dict[str, dict[str, np.ndarray]], cost_q: int, cost_v: int, budget_bytes: int
) -> None:
    costs = {"q": cost_q, "v": cost_v}
    kept = components_at_equal_bytes(adapters, costs, budget_bytes)
    assert set(kept) == {(adapter_id, module) for adapter_id, modules in adapters.items() for module in modules}
    assert all(0 <= count <= len(adapters[adapter_id][module]) for (adapter_id, module), count in kept.items())
    assert sum(count * costs[module] for (_, module), count in kept.items()) <= budget_bytes
    seen, best = total_error(adapters, kept), best_by_brute_force(adapters, costs, budget_bytes)
    # No more is missing than the best byte left out could still have bought with what was left over.
    left_over = budget_bytes - sum(count * costs[module] for (_, module), count in kept.items())
    gain_per_byte = [
        spectrum[kept[adapter_id, module]] / sum(own.sum() for own in modules.values()) / costs[module]
        for adapter_id, modules in adapters.items()
        for module, spectrum in modules.items()
        if kept[adapter_id, module] < len(spectrum)
    ]
    assert best - 1e-9 <= seen <= best + max(gain_per_byte, default=0.0) * left_over + 1e-9


def test_errors_at_equal_bytes_are_those_of_dense_truncation() -> None:
    factors = {
        name: {"q": pair[0], "v": pair[1]}
        for name, pair in (
            ("one", random_adapters((4, 2), 12, 15, seed=11)),
            ("two", random_adapters((3, 6), 12, 15, seed=12)),
        )
    }
    adapters = {
        name: {module: spectra(stack_of([pair]))[0] for module, pair in modules.items()}
        for name, modules in factors.items()
    }
    component_bytes, budget_bytes = {"q": 54, "v": 40}, 300
    kept = components_at_equal_bytes(adapters, component_bytes, budget_bytes)
    assert 0 < sum(kept.values()) < 15
    errors = errors_at_equal_bytes(adapters, component_bytes, budget_bytes)
    for name, modules in factors.items():
        Ms = {module: dense(pair) for module, pair in modules.items()}
        lost = sum(np.linalg.norm(M - cut(M, kept[name, module])) ** 2 for module, M in Ms.items())
        assert errors[name] == pytest.approx(lost / sum(np.linalg.norm(M) ** 2 for M in Ms.values()), abs=1e-6)


@few
@given(adapters=some_adapters)
def test_no_budget_loses_all_and_enough_loses_nothing(adapters: dict[str, dict[str, np.ndarray]]) -> None:
    costs = {"q": 3, "v": 5}
    assert errors_at_equal_bytes(adapters, costs, 0) == dict.fromkeys(adapters, 1.0)
    enough = sum(len(spectrum) * costs[m] for modules in adapters.values() for m, spectrum in modules.items())
    assert errors_at_equal_bytes(adapters, costs, enough) == dict.fromkeys(adapters, 0.0)
