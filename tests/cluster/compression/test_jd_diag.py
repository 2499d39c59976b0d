"""JD-Diag against dense float64 alternating least squares, written from its objective by numpy's least squares."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cluster.compression import jd_diag as module_under_test
from cluster.compression.basis import Basis, relative_errors, unit_cores
from cluster.compression.jd_diag import diagonal_cores, jd_diag
from cluster.compression.jd_full import jd_full
from cluster.compression.methods import METHODS
from tests.support.bundles import read_factors
from tests.support.dense import Dense, Factors, dense, random_adapters, related_adapters, stack_of
from tests.support.jd_alternating import jd_alternating
from tests.support.paths import ZOO

D_OUT, D_IN = 22, 26
REAL = "model.layers.14.self_attn.v_proj"
KINDS = ("random", "mixed ranks", "shared init", "related", "common terms", REAL)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def collection(kind: str) -> list[Factors]:
    if kind == "random":
        return random_adapters([3] * 10, D_OUT, D_IN, seed=1)
    if kind == "mixed ranks":
        return random_adapters((4, 1, 5, 3, 2, 4, 1), D_OUT, D_IN, seed=2)
    if kind == "shared init":
        A = random_adapters([4], D_OUT, D_IN, seed=3)[0][0]
        return [(A, B) for _, B in random_adapters([4] * 10, D_OUT, D_IN, seed=4)]
    if kind == "related":
        return related_adapters(12, rank=3, shared=6, d_out=D_OUT, d_in=D_IN, seed=5)
    if kind == "common terms":
        return common_terms(12, seed=6)
    # Rows and columns of five real adapters, thinned so that dense references stay quick.
    pairs = [read_factors(ZOO / "adapters" / name)[kind] for name in ("add", "city-country", "past", "roman", "larger")]
    return [(A[:, ::12].contiguous(), B[::4].contiguous()) for A, B in pairs]


def common_terms(count: int, seed: int) -> list[Factors]:
    """Every adapter mixes the same eight rank-one terms: what JD-Diag is made for."""
    A, B = random_adapters([8], D_OUT, D_IN, seed)[0]
    generator = torch.Generator().manual_seed(seed + 50)
    return [(A, B * torch.randn(8, generator=generator)) for _ in range(count)]


def units(adapters: list[Factors]) -> Dense:
    """[M_i / ||M_i||_F] (n, d_out, d_in)."""
    return np.stack([M / np.linalg.norm(M) for M in map(dense, adapters)])


def best_cores(Ms: Dense, U: Dense, V: Dense) -> Dense:
    """argmin_s ||vec(M_i) - sum_k s_k vec(u_k v_k^T)||, by the d_out d_in x r matrix of terms."""
    terms = np.einsum("ok,ik->oik", U, V).reshape(-1, U.shape[1])
    return np.linalg.lstsq(terms, Ms.reshape(len(Ms), -1).T, rcond=1e-9)[0].T


def squared_errors(Ms: Dense, U: Dense, S: Dense, V: Dense) -> NDArray[np.float64]:
    return ((Ms - np.einsum("ok,nk,ik->noi", U, S, V)) ** 2).sum((1, 2))


def dense_als(Ms: Dense, U: Dense, V: Dense, num_iterations: int) -> tuple[Dense, Dense, float]:
    """U, V and the mean error after so many rounds of three plain least squares over the unfolded stack."""
    for _ in range(num_iterations):
        S = best_cores(Ms, U, V)
        right = np.concatenate([s[:, None] * V.T for s in S], axis=1)  # [M_1 ... M_n] ~ U right
        U = np.linalg.lstsq(right.T, np.concatenate(list(Ms), axis=1).T, rcond=None)[0].T
        U = U / np.linalg.norm(U, axis=0)
        left = np.concatenate([U * s for s in S], axis=0)  # [M_1; ...; M_n] ~ left V^T
        V = np.linalg.lstsq(left, np.concatenate(list(Ms), axis=0), rcond=None)[0].T
        V = V / np.linalg.norm(V, axis=0)
    return U, V, float(squared_errors(Ms, U, best_cores(Ms, U, V), V).mean())


def as_numpy(basis: Basis) -> tuple[Dense, Dense]:
    return basis.U.double().numpy(), basis.V.double().numpy()


def dense_error(adapters: list[Factors], basis: Basis) -> float:
    """Mean error with the best cores, densely."""
    Ms, (U, V) = units(adapters), as_numpy(basis)
    return float(squared_errors(Ms, U, best_cores(Ms, U, V), V).mean())


def random_basis(rank: int, seed: int) -> Basis:
    generator = torch.Generator().manual_seed(seed)
    return Basis(torch.randn(D_OUT, rank, generator=generator), torch.randn(D_IN, rank, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "mixed ranks", "shared init", "related"])
def test_cores_are_the_least_squares_ones_on_any_basis(kind: str, dtype: torch.dtype) -> None:
    adapters = collection(kind)
    stack, Ms = stack_of(adapters), units(adapters)
    for basis in (random_basis(9, seed=0), jd_full(stack, 9, seed=0), jd_diag(stack, 9, seed=0)):
        stored = basis.rounded(dtype)
        U, V = as_numpy(stored)
        expected, seen = best_cores(Ms, U, V), diagonal_cores(stack, stored)
        assert (seen.dtype, seen.shape) == (torch.float32, expected.shape)
        np.testing.assert_allclose(seen.numpy(), expected, atol=1e-4 * np.abs(expected).max())
        best = squared_errors(Ms, U, expected, V)
        np.testing.assert_allclose(squared_errors(Ms, U, seen.double().numpy(), V), best, atol=1e-6)
        np.testing.assert_allclose(relative_errors(stack, stored, seen).numpy(), best, atol=1e-6)


def test_cores_are_finite_and_best_where_columns_repeat_or_vanish() -> None:
    adapters = collection("mixed ranks")
    stack, Ms = stack_of(adapters), units(adapters)
    plain = jd_diag(stack, 6, seed=0)
    nothing = torch.zeros(D_OUT, 1), torch.zeros(D_IN, 1)
    basis = Basis(torch.cat([plain.U, plain.U, nothing[0]], 1), torch.cat([plain.V, plain.V, nothing[1]], 1))
    cores = diagonal_cores(stack, basis)
    assert cores.isfinite().all()
    assert cores[:, -1].abs().max() == 0
    assert cores.abs().max() < 10
    U, V = as_numpy(plain)
    best = squared_errors(Ms, U, best_cores(Ms, U, V), V)
    np.testing.assert_allclose(relative_errors(stack, basis, cores).numpy(), best, atol=1e-6)


def test_errors_hold_for_any_basis_and_any_diagonal_cores() -> None:
    adapters = collection("mixed ranks")
    basis = random_basis(5, seed=1)
    cores = torch.randn(len(adapters), 5, generator=torch.Generator().manual_seed(2)) / 50
    U, V = as_numpy(basis)
    expected = squared_errors(units(adapters), U, cores.double().numpy(), V)
    seen = relative_errors(stack_of(adapters), basis, cores)
    assert seen.dtype == torch.float64
    np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-6)
    full = relative_errors(stack_of(adapters), basis, torch.diag_embed(cores))
    np.testing.assert_allclose(seen.numpy(), full.numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [3, 8])
def test_its_steps_are_those_of_dense_least_squares(kind: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = collection(kind)
    stack, Ms = stack_of(adapters), units(adapters)
    monkeypatch.setattr(module_under_test, "TOLERANCE", -1.0)  # so that only the cap ends it
    monkeypatch.setattr(module_under_test, "MAX_ITERATIONS", 0)
    U, V = as_numpy(jd_diag(stack, rank, seed=0))
    for num_iterations in (1, 2, 3):
        U, V, expected = dense_als(Ms, U, V, 1)
        monkeypatch.setattr(module_under_test, "MAX_ITERATIONS", num_iterations)
        assert dense_error(adapters, jd_diag(stack, rank, seed=0)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 6])
def test_it_ends_as_low_as_dense_least_squares_from_many_starts_run_to_their_end(kind: str, rank: int) -> None:
    adapters = collection(kind)
    Ms = units(adapters)
    generator = np.random.default_rng(0)
    theirs = [
        dense_als(
            Ms, generator.standard_normal((Ms.shape[1], rank)), generator.standard_normal((Ms.shape[2], rank)), 60
        )
        for _ in range(3)
    ]
    ours = dense_error(adapters, jd_diag(stack_of(adapters), rank, seed=0))
    assert ours <= min(error for _, _, error in theirs) + 0.03  # optima are many; it starts once


@pytest.mark.parametrize("kind", ["random", "shared init", "related", REAL])
def test_the_error_never_rises_from_one_iteration_to_the_next(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = collection(kind)
    monkeypatch.setattr(module_under_test, "TOLERANCE", -1.0)
    errors = []
    for num_iterations in (0, 1, 2, 3, 5, 10, 40):
        monkeypatch.setattr(module_under_test, "MAX_ITERATIONS", num_iterations)
        errors.append(dense_error(adapters, jd_diag(stack_of(adapters), 5, seed=0)))
    assert max(np.diff(errors)) <= 2e-6
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("kind", ["related", "common terms"])
@pytest.mark.parametrize("rank", [4, 30])
def test_the_iteration_ends_by_itself_also_with_rank_to_spare(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_calls = 0
    best = module_under_test._best_cores

    def counted(*arguments: torch.Tensor) -> tuple[torch.Tensor, float]:
        nonlocal num_calls
        num_calls += 1
        return best(*arguments)

    monkeypatch.setattr(module_under_test, "_best_cores", counted)
    monkeypatch.setattr(module_under_test, "MAX_ITERATIONS", 10_000)
    jd_diag(stack_of(collection(kind)), rank, seed=0)
    assert num_calls < 500


@pytest.mark.parametrize("seed", range(4))
def test_terms_common_to_all_adapters_are_found(seed: int) -> None:
    assert dense_error(common_terms(20, seed), jd_diag(stack_of(common_terms(20, seed)), 8, seed=0)) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_columns_come_in_pairs_of_norm_one(kind: str, rank: int) -> None:
    basis = jd_diag(stack_of(collection(kind)), rank, seed=0)
    assert basis.U.shape[1] == basis.V.shape[1] <= rank
    assert basis.U.dtype == basis.V.dtype == torch.float32
    for columns in as_numpy(basis):
        np.testing.assert_allclose(np.linalg.norm(columns, axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [4, 16])
def test_storage_in_bfloat16_costs_no_more_than_its_own_rounding(kind: str, rank: int) -> None:
    stack = stack_of(collection(kind))
    basis = jd_diag(stack, rank, seed=0)
    stored, norms = basis.rounded(torch.bfloat16), stack.norms.view(-1, 1)
    cores = (diagonal_cores(stack, stored) * norms).bfloat16() / norms
    before = relative_errors(stack, basis, diagonal_cores(stack, basis))
    lost = relative_errors(stack, stored, cores) - before
    assert lost.mean() < 5e-5  # about RIDGE times a few
    assert lost.max() < 2e-3  # of a single adapter it is as often less than nothing


def test_terms_that_would_grow_and_cancel_are_held_back_for_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two dense slices whose best approximation in as many terms does not exist: run to its end, plain least squares
    # comes ever nearer by terms ever larger, and loses more than that in storage.
    adapters = random_adapters([6] * 2, 6, 6, seed=12)
    stack = stack_of(adapters)
    monkeypatch.setattr(module_under_test, "MAX_ITERATIONS", 1000)
    monkeypatch.setattr(module_under_test, "TOLERANCE", 1e-9)
    largest, in_float32, stored = [], [], []
    for ridge in (module_under_test.RIDGE, 1e-12):
        monkeypatch.setattr(module_under_test, "RIDGE", ridge)
        basis = jd_diag(stack, 6, seed=0)
        in_float32.append(dense_error(adapters, basis))
        basis = basis.rounded(torch.bfloat16)
        cores = diagonal_cores(stack, basis).bfloat16().float()
        largest.append(float(cores.abs().max()))
        stored.append(float(relative_errors(stack, basis, cores).mean()))
    assert largest[0] < 0.5 * largest[1]
    assert in_float32[0] > in_float32[1]
    assert stored[0] < stored[1]


@pytest.mark.parametrize(
    ("rank", "ranks", "d_out", "d_in", "expected"),
    [
        (3, (4, 4), 20, 30, 3),
        (16, (4, 3), 20, 30, 7),
        (16, (8, 8, 8), 12, 30, 16),  # more than d_out: still of use
        (64, (8, 8), 5, 30, 10),  # no adapter has more than d_out singular pairs
        (64, (3,) * 10, 3, 4, 12),  # as many terms as a matrix has entries hold every matrix
    ],
)
def test_rank_is_the_least_of_what_is_asked_and_what_holds_the_stack(
    rank: int, ranks: tuple[int, ...], d_out: int, d_in: int, expected: int
) -> None:
    basis = jd_diag(stack_of(random_adapters(ranks, d_out, d_in, seed=8)), rank, seed=0)
    assert (basis.U.shape, basis.V.shape) == ((d_out, expected), (d_in, expected))


def test_copies_of_an_adapter_need_no_more_terms_than_one_of_them() -> None:
    adapters = random_adapters([4], D_OUT, D_IN, seed=9) * 8
    basis = jd_diag(stack_of(adapters), 32, seed=0)
    assert basis.U.shape[1] == 4
    assert dense_error(adapters, basis) < 1e-6


@pytest.mark.parametrize("kind", ["random", "mixed ranks", REAL])
def test_the_bits_depend_on_the_stack_and_the_rank_alone(kind: str) -> None:
    stack = stack_of(collection(kind))
    torch.manual_seed(1)
    first = jd_diag(stack, 6, seed=3)
    torch.manual_seed(2)
    again = jd_diag(stack, 6, seed=4)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.V, again.V)


@pytest.mark.parametrize("scale_A", [1e-12, 1e12])
@pytest.mark.parametrize("scale_B", [1e-12, 1e12])
def test_an_adapter_of_extreme_scale_changes_nobodys_error(scale_A: float, scale_B: float) -> None:
    plain = collection("related")
    A, B = plain[5]
    scaled = [*plain[:5], (A * scale_A, B * scale_B), *plain[6:]]
    assert dense_error(scaled, jd_diag(stack_of(scaled), 6, seed=0)) == pytest.approx(
        dense_error(plain, jd_diag(stack_of(plain), 6, seed=0)), abs=1e-4
    )


def test_badly_balanced_factors_are_the_same_adapters() -> None:
    plain = collection("mixed ranks")
    unbalanced = []
    for A, B in plain:
        scales = torch.logspace(-3, 3, len(A))
        unbalanced.append((A * scales.unsqueeze(1), B / scales))
    seen, expected = (jd_diag(stack_of(adapters), 6, seed=0) for adapters in (unbalanced, plain))
    assert dense_error(unbalanced, seen) == pytest.approx(dense_error(plain, expected), abs=1e-4)


@pytest.mark.parametrize("name", ["jd-full", "jd-diag"])
def test_every_joint_method_fits_and_takes_cores_on_bases_it_did_not_fit(name: str) -> None:
    method = METHODS[name]
    seen, unseen = stack_of(collection("related")[:8]), stack_of(collection("related")[8:])
    basis = method.fit(seen, 6, 0).rounded(torch.bfloat16)
    cores = method.cores(unseen, basis)
    assert cores.shape == ((4, 6, 6) if name == "jd-full" else (4, 6))
    errors = relative_errors(unseen, basis, cores)
    assert relative_errors(unseen, basis, torch.zeros_like(cores)).tolist() == [1.0] * 4
    assert errors.max() < 1
    for bent in (cores * 1.05, cores * 0.95):
        assert (relative_errors(unseen, basis, bent) > errors).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_errors_and_keeps_its_results(kind: str) -> None:
    stack = stack_of(collection(kind))
    there = stack.to("cuda")
    for fit, best in ((jd_diag, diagonal_cores), (jd_alternating, unit_cores)):
        here = fit(stack, 6, 0)
        basis = fit(there, 6, 0)
        cores = best(there, basis)
        errors = relative_errors(there, basis, cores)
        assert {tensor.device.type for tensor in (basis.U, basis.V, cores, errors)} == {"cuda"}
        expected = relative_errors(stack, here, best(stack, here))
        np.testing.assert_allclose(errors.cpu().mean(), expected.mean(), atol=1e-3)
