"""Joint diagonalisation against dense float64: its errors, its optimum, and what the paper proves of it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cluster.compression import jd_full as jd
from cluster.compression.basis import Basis, captured_energy, relative_errors, unit_cores
from cluster.compression.jd_full import jd_full
from cluster.compression.stack import FactorStack
from infra.bench.products import ProductLog
from tests.support.bundles import read_factors
from tests.support.dense import Dense, Factors, dense, random_adapters, related_adapters, rotation, stack_of
from tests.support.paths import ZOO

D_OUT, D_IN = 40, 48
MIXED_RANKS = (4, 1, 8, 3, 2, 4, 6, 1)
REAL_MODULES = ("model.layers.14.self_attn.q_proj", "model.layers.20.self_attn.v_proj")


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def collection(kind: str) -> list[Factors]:
    if kind == "random":
        return random_adapters([4] * 12, D_OUT, D_IN, seed=1)
    if kind == "mixed ranks":
        return random_adapters(MIXED_RANKS, D_OUT, D_IN, seed=2)
    if kind == "shared init":
        A = random_adapters([4], D_OUT, D_IN, seed=3)[0][0]
        return [(A, B) for _, B in random_adapters([4] * 12, D_OUT, D_IN, seed=4)]
    if kind == "related":
        return related_adapters(12, rank=4, shared=8, d_out=D_OUT, d_in=D_IN, seed=5)
    return [factors[kind] for folder in sorted((ZOO / "adapters").iterdir()) if kind in (factors := real(folder.name))]


@cache
def real(name: str) -> dict[str, Factors]:
    return read_factors(ZOO / "adapters" / name)


def units(adapters: list[Factors]) -> list[Dense]:
    """M_i / ||M_i||_F."""
    return [M / np.linalg.norm(M) for M in map(dense, adapters)]


def as_numpy(basis: Basis) -> tuple[Dense, Dense]:
    return basis.U.double().numpy(), basis.V.double().numpy()


def dense_errors(adapters: list[Factors], basis: Basis) -> NDArray[np.float64]:
    """||M - U U^T M V V^T||^2 / ||M||^2."""
    U, V = as_numpy(basis)
    return np.array([np.linalg.norm(M - U @ (U.T @ M @ V) @ V.T) ** 2 for M in units(adapters)])


def kept(adapters: list[Factors], rank: int, seed: int) -> float:
    """Mean of ||U^T M V||^2 / ||M||^2, densely."""
    U, V = as_numpy(jd_full(stack_of(adapters), rank, seed))
    return float(np.mean([np.linalg.norm(U.T @ M @ V) ** 2 for M in units(adapters)]))


def top_left(columns: Dense, rank: int) -> Dense:
    """The top left singular vectors, by the smaller Gram matrix."""
    energies, right = np.linalg.eigh(columns.T @ columns)
    return columns @ (right[:, -rank:] / np.sqrt(energies[-rank:]))


def alternating(adapters: list[Factors], rank: int, seed: int, num_iterations: int) -> float:
    """The paper's main algorithm, dense: U <- top left subspace of [M_i V], V <- of [M_i^T U]. Mean share kept."""
    Ms = np.stack(units(adapters))
    V = np.linalg.qr(np.random.default_rng(seed).standard_normal((Ms.shape[2], rank)))[0]
    share = 0.0
    for _ in range(num_iterations):
        U = top_left(np.concatenate(list(Ms @ V), axis=1), rank)
        projected = U.T @ Ms
        V = top_left(np.concatenate(list(projected), axis=0).T, rank)
        before, share = share, float(((projected @ V) ** 2).sum()) / len(Ms)
        if share - before < 1e-8:
            break
    return share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "mixed ranks", "related", REAL_MODULES[0]])
@pytest.mark.parametrize("rank", [3, 16])
def test_errors_equal_a_dense_reconstruction_from_the_stored_dtype(kind: str, rank: int, dtype: torch.dtype) -> None:
    adapters = collection(kind)
    stack = stack_of(adapters)
    basis = jd_full(stack, rank, seed=0).rounded(dtype)
    assert torch.equal(basis.U, basis.U.to(dtype).float())
    norms = stack.norms.float().view(-1, 1, 1)
    cores = (unit_cores(stack, basis) * norms).to(dtype).float() / norms
    U, V = as_numpy(basis)
    expected = [
        np.linalg.norm(M - U @ S @ V.T) ** 2 for M, S in zip(units(adapters), cores.double().numpy(), strict=True)
    ]
    seen = relative_errors(stack, basis, cores)
    assert seen.dtype == torch.float64
    np.testing.assert_allclose(seen.numpy(), expected, atol=1e-6)


def test_errors_hold_for_any_basis_and_any_cores() -> None:
    adapters = collection("mixed ranks")
    generator = torch.Generator().manual_seed(0)
    basis = Basis(torch.randn(D_OUT, 5, generator=generator), torch.randn(D_IN, 5, generator=generator))
    cores = torch.randn(len(adapters), 5, 5, generator=generator) / 50
    U, V = as_numpy(basis)
    expected = [
        np.linalg.norm(M - U @ S @ V.T) ** 2 for M, S in zip(units(adapters), cores.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(relative_errors(stack_of(adapters), basis, cores).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["random", "mixed ranks", "shared init", *REAL_MODULES])
def test_captured_energy_is_one_minus_the_dense_error(kind: str) -> None:
    adapters = collection(kind)
    stack = stack_of(adapters)
    basis = jd_full(stack, 8, seed=0)
    U, V = as_numpy(basis)
    captured = captured_energy(stack, basis).numpy()
    np.testing.assert_allclose(captured, [np.linalg.norm(U.T @ M @ V) ** 2 for M in units(adapters)], atol=1e-6)
    np.testing.assert_allclose(1 - captured, dense_errors(adapters, basis), atol=1e-6)
    np.testing.assert_allclose(unit_cores(stack, basis).numpy(), [U.T @ M @ V for M in units(adapters)], atol=1e-6)


@pytest.mark.parametrize("ranks", [(1,), (4,), MIXED_RANKS, (3,) * 10])
@pytest.mark.parametrize("spare", [0, 5])
def test_rank_of_the_sum_of_ranks_is_lossless_and_no_error_is_below_zero(ranks: tuple[int, ...], spare: int) -> None:
    adapters = random_adapters(ranks, D_OUT, D_IN, seed=6)
    stack = stack_of(adapters)
    basis = jd_full(stack, sum(ranks) + spare, seed=0)
    assert basis.U.shape[1] == basis.V.shape[1] == sum(ranks)
    assert dense_errors(adapters, basis).max() < 1e-6
    errors = relative_errors(stack, basis, unit_cores(stack, basis))
    assert errors.min() >= 0
    assert errors.max() < 1e-6


def test_real_adapters_are_lossless_at_the_sum_of_their_ranks() -> None:
    adapters = collection(REAL_MODULES[0])
    total = sum(len(A) for A, _ in adapters)
    basis = jd_full(stack_of(adapters), total, seed=0)
    assert basis.U.shape[1] == basis.V.shape[1] == total
    assert dense_errors(adapters, basis).max() < 1e-6


def test_as_many_directions_as_a_square_module_has_are_lossless() -> None:
    adapters = random_adapters([4] * 6, 10, 10, seed=7)
    basis = jd_full(stack_of(adapters), 64, seed=0)
    assert basis.U.shape[1] == basis.V.shape[1] == 10
    assert dense_errors(adapters, basis).max() < 1e-6


@pytest.mark.parametrize(
    ("rank", "ranks", "d_out", "d_in", "expected"),
    [
        (3, (4, 4), 20, 30, (3, 3)),
        (16, (4, 3), 20, 30, (7, 7)),
        (16, (8, 8, 8), 12, 30, (12, 16)),
        (16, (8, 8, 8), 30, 9, (16, 9)),
    ],
)
def test_rank_is_the_least_of_what_is_asked_the_sum_of_ranks_and_its_own_side(
    rank: int, ranks: tuple[int, ...], d_out: int, d_in: int, expected: tuple[int, int]
) -> None:
    basis = jd_full(stack_of(random_adapters(ranks, d_out, d_in, seed=8)), rank, seed=0)
    assert (basis.U.shape, basis.V.shape) == ((d_out, expected[0]), (d_in, expected[1]))


@pytest.mark.parametrize(("d_out", "d_in"), [(12, 40), (40, 12), (12, 12)])
def test_a_module_narrower_than_the_sum_of_ranks_is_lossless_all_the_same(d_out: int, d_in: int) -> None:
    adapters = random_adapters([8, 4, 8], d_out, d_in, seed=3)
    assert dense_errors(adapters, jd_full(stack_of(adapters), 20, seed=0)).max() < 1e-6


@pytest.mark.parametrize("kind", ["random", "mixed ranks", "shared init", "copies", *REAL_MODULES])
@pytest.mark.parametrize("rank", [1, 8, 30])
def test_basis_is_orthonormal_also_where_adapters_are_dependent(kind: str, rank: int) -> None:
    adapters = random_adapters([4], D_OUT, D_IN, seed=9) * 8 if kind == "copies" else collection(kind)
    basis = jd_full(stack_of(adapters), rank, seed=0)
    for columns in as_numpy(basis):
        np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-5)
    if kind == "copies" and rank >= 4:
        assert dense_errors(adapters, basis).max() < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_one_adapter_alone_is_its_truncated_svd(rank: int) -> None:
    adapters = random_adapters([6], D_OUT, D_IN, seed=10)
    singular = np.linalg.svd(units(adapters)[0], compute_uv=False)
    assert kept(adapters, rank, seed=0) == pytest.approx(float((singular[:rank] ** 2).sum()), abs=2e-3)


@pytest.mark.parametrize("kind", ["random", "shared init", "mixed ranks", REAL_MODULES[0]])
def test_captured_energy_never_falls_from_one_iteration_to_the_next(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = collection(kind)
    monkeypatch.setattr(jd, "TOLERANCE", -1.0)  # so that only the cap ends it
    shares = []
    for num_iterations in range(1, 9):
        monkeypatch.setattr(jd, "MAX_ITERATIONS", num_iterations)
        shares.append(kept(adapters, 4, seed=0))
    assert min(np.diff(shares)) >= -1e-6
    assert shares[-1] > shares[0] + 0.01


@pytest.mark.parametrize("rank", [4, 48])
def test_the_iteration_ends_by_itself_also_with_rank_to_spare(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_calls = 0
    orthonormal = jd._orthonormal

    def counted(columns: torch.Tensor) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        return orthonormal(columns)

    monkeypatch.setattr(jd, "_orthonormal", counted)
    monkeypatch.setattr(jd, "MAX_ITERATIONS", 10_000)
    jd_full(stack_of(collection("related")), rank, seed=0)
    assert num_calls < 2 * 100


@pytest.mark.parametrize("kind", ["random", "related", REAL_MODULES[0]])
def test_beginning_with_few_singular_values_saves_products_with_all_and_loses_nothing(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = stack_of(collection(kind) * 2)

    def fit() -> tuple[float, int]:
        with ProductLog({stack.A.numel(), stack.B.numel()}) as log:
            bases = [jd_full(stack, 4, seed) for seed in range(6)]
        return float(np.mean([captured_energy(stack, basis).mean() for basis in bases])), log.large_operations

    kept, operations = fit()
    monkeypatch.setattr(jd, "leading", lambda *_: None)
    kept_at_once, operations_at_once = fit()
    assert kept >= kept_at_once - 0.01
    assert operations < 0.7 * operations_at_once


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("random", 4), ("random", 16), ("shared init", 4), ("shared init", 16), ("related", 8), ("mixed ranks", 8),
        (REAL_MODULES[0], 16), (REAL_MODULES[1], 8),
    ],
)  # fmt: skip
def test_it_keeps_as_much_as_the_papers_alternating_algorithm_run_densely_to_its_end(kind: str, rank: int) -> None:
    adapters = collection(kind)
    num_starts, num_iterations = (2, 15) if kind in REAL_MODULES else (3, 200)
    ours = [kept(adapters, rank, seed) for seed in range(num_starts)]
    theirs = [alternating(adapters, rank, seed, num_iterations) for seed in range(num_starts)]
    assert max(ours) >= max(theirs) - 0.01
    assert np.mean(ours) >= np.mean(theirs) - 0.01


@pytest.mark.parametrize("kind", ["random", "shared init", "related", *REAL_MODULES])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
def test_no_more_is_kept_than_theorem_1_allows(kind: str, rank: int) -> None:
    adapters = collection(kind)
    L = np.stack([M.ravel() for M in units(adapters)])
    energies = np.linalg.eigvalsh(L @ L.T)[::-1]
    n = len(adapters)
    assert kept(adapters, rank, seed=0) * n <= energies[: min(rank**2, n)].sum() + 1e-6


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_orthogonal_adapters_meet_the_corollarys_bound_where_it_is_tight(rank: int) -> None:
    # All products u_i v_j^T of two orthonormal families: n = 16, and any basis inside them keeps exactly r^2.
    u, v = rotation(D_OUT, 1).float(), rotation(D_IN, 2).float()
    adapters = [(v[:, j : j + 1].T, u[:, i : i + 1]) for i in range(4) for j in range(4)]
    basis = jd_full(stack_of(adapters), rank, seed=0)
    assert dense_errors(adapters, basis).mean() == pytest.approx(1 - rank**2 / 16, abs=1e-5)


def test_orthogonal_adapters_are_never_better_than_the_corollary() -> None:
    # Disjoint rows of one rotation: <M_i, M_j> = 0.
    u, v = rotation(D_OUT, 3).float(), rotation(D_IN, 4).float()
    adapters = [(v[3 * i : 3 * i + 3], u[:, 3 * i : 3 * i + 3]) for i in range(12)]
    L = np.stack([M.ravel() for M in units(adapters)])
    np.testing.assert_allclose(L @ L.T, np.eye(12), atol=1e-6)
    for rank in (1, 2, 3, 8):
        error = dense_errors(adapters, jd_full(stack_of(adapters), rank, seed=0)).mean()
        assert error >= 1 - min(rank**2 / 12, 1) - 1e-6


@pytest.mark.parametrize("kind", ["random", "mixed ranks", REAL_MODULES[0]])
def test_a_seed_gives_the_same_bits_again_and_another_seed_others(kind: str) -> None:
    def fit(seed: int) -> Basis:
        return jd_full(stack_of(collection(kind)), 8, seed)

    torch.manual_seed(1)
    first = fit(3)
    torch.manual_seed(2)
    again, other = fit(3), fit(4)
    assert torch.equal(first.U, again.U)
    assert torch.equal(first.V, again.V)
    assert not torch.equal(first.U, other.U)


@pytest.mark.parametrize("scale_A", [1e-12, 1e12])
@pytest.mark.parametrize("scale_B", [1e-12, 1e12])
def test_an_adapter_of_extreme_scale_changes_nobodys_error(scale_A: float, scale_B: float) -> None:
    plain = collection("related")
    A, B = plain[5]
    scaled = [*plain[:5], (A * scale_A, B * scale_B), *plain[6:]]
    stack = stack_of(scaled)
    basis = jd_full(stack, 8, seed=0)
    errors = relative_errors(stack, basis, unit_cores(stack, basis))
    np.testing.assert_allclose(errors, dense_errors(scaled, basis), atol=1e-6)
    np.testing.assert_allclose(errors, dense_errors(plain, jd_full(stack_of(plain), 8, seed=0)), atol=1e-4)


def test_an_adapter_of_zero_norm_leaves_the_basis_bit_for_bit_alone() -> None:
    plain = collection("mixed ranks")
    with_zero = [*plain[:3], (plain[0][0], torch.zeros(D_OUT, 4)), *plain[3:]]
    expected, seen = jd_full(stack_of(plain), 8, seed=0), jd_full(stack_of(with_zero), 8, seed=0)
    assert torch.equal(seen.U, expected.U)
    assert torch.equal(seen.V, expected.V)


invariance = settings(derandomize=True, max_examples=7, deadline=None)
seeds = st.integers(0, 10_000)


def related(seed: int) -> tuple[list[Factors], FactorStack]:
    """A collection with one clear optimum, which every start finds."""
    adapters = related_adapters(9, rank=3, shared=6, d_out=D_OUT, d_in=D_IN, seed=seed)
    return adapters, stack_of(adapters)


def assert_same_total_error(plain: list[Factors], changed: list[Factors], abs_tolerance: float = 1e-3) -> None:
    before, after = kept(plain, 6, seed=0), kept(changed, 6, seed=0)
    assert 0.8 < before < 0.999
    assert after == pytest.approx(before, abs=abs_tolerance)


@invariance
@given(seed=seeds, order=st.permutations(range(9)))
def test_the_order_of_adapters_does_not_matter(seed: int, order: list[int]) -> None:
    adapters, _ = related(seed)
    assert_same_total_error(adapters, [adapters[i] for i in order])


@invariance
@given(seed=seeds, which=st.integers(0, 8), factor=st.floats(1e-6, 1e6), negative=st.booleans())
def test_an_adapters_own_scale_does_not_matter(seed: int, which: int, factor: float, negative: bool) -> None:
    adapters, _ = related(seed)
    A, B = adapters[which]
    scaled = [*adapters]
    scaled[which] = (A, B * (-factor if negative else factor))
    assert_same_total_error(adapters, scaled)


@invariance
@given(seed=seeds)
def test_how_an_adapter_is_factored_does_not_matter(seed: int) -> None:
    adapters, _ = related(seed)
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for A, B in adapters:
        R = torch.randn(3, 3, generator=generator, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
        changed.append(((R @ A.double()).float(), (B.double() @ torch.linalg.inv(R)).float()))
    assert_same_total_error(adapters, changed)


@invariance
@given(seed=seeds)
def test_rotating_inputs_and_outputs_does_not_matter(seed: int) -> None:
    adapters, _ = related(seed)
    left, right = rotation(D_OUT, seed), rotation(D_IN, seed + 1)
    rotated = [((A.double() @ right).float(), (left @ B.double()).float()) for A, B in adapters]
    assert_same_total_error(adapters, rotated)
