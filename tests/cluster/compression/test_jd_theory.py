"""What theory says of every joint method: bounds, identities, what is lossless, what cannot matter.

JD-Full's own eigenvalue iteration is held to Theorem 1, the corollary and the invariances in test_jd_full.py; here are
its check, the alternating form, and JD-Diag, for which r terms take the place of r^2 numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.compression import jd_full as jd
from cluster.compression.basis import Basis, relative_errors, unit_cores
from cluster.compression.jd_diag import diagonal_cores, jd_diag
from cluster.compression.jd_full import jd_full
from cluster.compression.stack import FactorStack
from cluster.compression.svd import spectra, truncate
from tests.support.bundles import read_factors
from tests.support.dense import Dense, Factors, dense, random_adapters, related_adapters, rotation, stack_of
from tests.support.jd_alternating import jd_alternating
from tests.support.paths import ZOO

D_OUT, D_IN = 36, 44
REAL = "model.layers.20.self_attn.k_proj"
KINDS = ("random", "mixed ranks", "shared init", "related", REAL)

Fit = Callable[[FactorStack, int, int], Basis]
Cores = Callable[[FactorStack, Basis], Tensor]
METHODS: dict[str, tuple[Fit, Cores]] = {
    "eigenvalue": (jd_full, unit_cores),
    "alternating": (jd_alternating, unit_cores),
    "diagonal": (jd_diag, diagonal_cores),
}
each_method = pytest.mark.parametrize("method", METHODS)


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def collection(kind: str) -> list[Factors]:
    if kind == "random":
        return random_adapters([4] * 10, D_OUT, D_IN, seed=1)
    if kind == "mixed ranks":
        return random_adapters((4, 1, 8, 3, 2, 4, 6, 1), D_OUT, D_IN, seed=2)
    if kind == "shared init":
        A = random_adapters([4], D_OUT, D_IN, seed=3)[0][0]
        return [(A, B) for _, B in random_adapters([4] * 10, D_OUT, D_IN, seed=4)]
    if kind == "related":
        return related_adapters(12, rank=4, shared=8, d_out=D_OUT, d_in=D_IN, seed=5)
    names = ("add", "date-us", "number-en", "past", "roman", "larger")
    return [read_factors(ZOO / "adapters" / name)[kind] for name in names]


def units(adapters: list[Factors]) -> Dense:
    return np.stack([M / np.linalg.norm(M) for M in map(dense, adapters)])


def errors(method: str, adapters: list[Factors], rank: int, seed: int = 0) -> Dense:
    """Each adapter's relative error, reconstructed densely from the basis and the cores."""
    fit, best = METHODS[method]
    stack = stack_of(adapters)
    basis = fit(stack, rank, seed)
    return dense_errors(adapters, basis, best(stack, basis))


def dense_errors(adapters: list[Factors], basis: Basis, cores: Tensor) -> Dense:
    full = torch.diag_embed(cores) if cores.dim() == 2 else cores
    U, V, S = basis.U.double().numpy(), basis.V.double().numpy(), full.double().numpy()
    return ((units(adapters) - U @ S @ V.T) ** 2).sum((1, 2))


def top_energy(Ms: Dense, rank: int) -> float:
    """The energy of the top left singular vectors of [M_1 ... M_n]."""
    return float((np.linalg.svd(np.concatenate(list(Ms), axis=1), compute_uv=False)[:rank] ** 2).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [3, 12])
def test_every_alternating_step_takes_the_whole_top_subspace(
    kind: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = collection(kind)
    stack, Ms = stack_of(adapters), units(adapters)
    monkeypatch.setattr(jd, "TOLERANCE", -1.0)  # so that only the cap ends it
    V_before = None
    for num_iterations in (1, 2, 3):
        monkeypatch.setattr(jd, "MAX_ITERATIONS", num_iterations)
        basis = jd_alternating(stack, rank, seed=0)
        U, V = basis.U.double().numpy(), basis.V.double().numpy()
        for columns in (U, V):
            np.testing.assert_allclose(columns.T @ columns, np.eye(rank), atol=1e-5)
        assert ((U.T @ Ms @ V) ** 2).sum() == pytest.approx(top_energy(Ms.transpose(0, 2, 1) @ U, rank), rel=1e-5)
        if V_before is not None:
            assert ((U.T @ Ms @ V_before) ** 2).sum() == pytest.approx(top_energy(Ms @ V_before, rank), rel=1e-5)
        V_before = V


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [8, 12])  # at rank 2 both have optima enough to end in different ones
def test_the_alternating_form_and_the_eigenvalue_iteration_end_alike(kind: str, rank: int) -> None:
    adapters = collection(kind)
    seen = [min(errors(m, adapters, rank, seed).mean() for seed in range(3)) for m in ("eigenvalue", "alternating")]
    assert seen[0] == pytest.approx(seen[1], abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 3, 7])
def test_no_more_is_kept_than_theorem_1_allows(kind: str, rank: int) -> None:
    # r x r cores span r^2 directions of L = [vec(M_i)]_i, diagonal ones r.
    adapters = collection(kind)
    Ms, n = units(adapters), len(adapters)
    energies = np.linalg.svd(Ms.reshape(n, -1), compute_uv=False) ** 2
    for method, num_directions in (("alternating", rank**2), ("diagonal", rank)):
        assert (1 - errors(method, adapters, rank)).sum() <= energies[: min(num_directions, n)].sum() + 1e-5


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_orthogonal_adapters_meet_the_corollarys_bound_where_it_is_tight(rank: int) -> None:
    # All products u_i v_j^T of two orthonormal families are orthogonal to each other, n = 16.
    u, v = rotation(D_OUT, 1).float(), rotation(D_IN, 2).float()
    adapters = [(v[:, j : j + 1].T, u[:, i : i + 1]) for i in range(4) for j in range(4)]
    assert errors("alternating", adapters, rank).mean() == pytest.approx(1 - rank**2 / 16, abs=1e-5)
    assert errors("diagonal", adapters, rank).mean() == pytest.approx(1 - rank / 16, abs=1e-5)


def test_orthogonal_adapters_are_never_better_than_the_corollary() -> None:
    u, v = rotation(D_OUT, 3).float(), rotation(D_IN, 4).float()
    adapters = [(v[3 * i : 3 * i + 3], u[:, 3 * i : 3 * i + 3]) for i in range(12)]
    for rank in (1, 2, 3, 8):
        assert errors("alternating", adapters, rank).mean() >= 1 - min(rank**2 / 12, 1) - 1e-6
        assert errors("diagonal", adapters, rank).mean() >= 1 - min(rank / 12, 1) - 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [3, 6])
def test_full_cores_on_the_same_directions_keep_no_less_than_diagonal_ones(kind: str, rank: int) -> None:
    adapters = collection(kind)
    stack = stack_of(adapters)
    basis = jd_diag(stack, rank, seed=0)
    diagonal = dense_errors(adapters, basis, diagonal_cores(stack, basis))
    orthonormal = Basis(torch.linalg.qr(basis.U).Q, torch.linalg.qr(basis.V).Q)
    full = dense_errors(adapters, orthonormal, unit_cores(stack, orthonormal))
    assert (full <= diagonal + 1e-5).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 3])
def test_diagonal_cores_on_all_pairs_of_columns_are_full_cores(kind: str, rank: int) -> None:
    adapters = collection(kind)
    stack = stack_of(adapters)
    basis = jd_full(stack, rank, seed=0)
    pairs = Basis(basis.U.repeat_interleave(rank, 1), basis.V.repeat(1, rank))
    cores = diagonal_cores(stack, pairs)
    np.testing.assert_allclose(cores.view(-1, rank, rank), unit_cores(stack, basis), atol=1e-5)


@each_method
@pytest.mark.parametrize("kind", ["random", "mixed ranks", REAL])
def test_energy_lost_is_energy_less_what_the_best_cores_take(method: str, kind: str) -> None:
    # In the adapters' own scale: ||M||^2 - ||S||^2, and ||M||^2 - sigma^T diag(U^T M V).
    adapters = collection(kind)
    fit, best = METHODS[method]
    stack = stack_of(adapters)
    basis = fit(stack, 7, 0)
    U, V = basis.U.double().numpy(), basis.V.double().numpy()
    for M, S, norm in zip(map(dense, adapters), best(stack, basis).double().numpy(), stack.norms, strict=True):
        S = S * float(norm)
        if method == "diagonal":
            taken, lost = S @ np.diag(U.T @ M @ V), np.linalg.norm(M - (U * S) @ V.T) ** 2
        else:
            taken, lost = np.linalg.norm(S) ** 2, np.linalg.norm(M - U @ S @ V.T) ** 2
        energy = np.linalg.norm(M) ** 2
        assert lost == pytest.approx(energy - taken, abs=2e-6 * energy)


@pytest.mark.parametrize("method", ["alternating", "diagonal"])
@pytest.mark.parametrize("ranks", [(1,), (4,), (4, 1, 8, 3, 2, 4), (3,) * 10])
@pytest.mark.parametrize("spare", [0, 5])
def test_rank_of_the_sum_of_ranks_is_lossless(method: str, ranks: tuple[int, ...], spare: int) -> None:
    adapters = random_adapters(ranks, D_OUT, D_IN, seed=6)
    assert errors(method, adapters, sum(ranks) + spare).max() < 1e-5


@pytest.mark.parametrize("method", ["alternating", "diagonal"])
def test_real_adapters_are_lossless_at_the_sum_of_their_ranks(method: str) -> None:
    adapters = collection(REAL)
    assert errors(method, adapters, sum(len(A) for A, _ in adapters)).max() < 1e-5


@each_method
def test_one_less_than_the_sum_of_independent_adapters_ranks_is_not_lossless(method: str) -> None:
    adapters = random_adapters([3] * 4, D_OUT, D_IN, seed=7)
    assert errors(method, adapters, 11).mean() > 1e-3


def test_all_directions_of_a_narrow_module_are_lossless_for_full_cores_and_not_for_diagonal_ones() -> None:
    adapters = random_adapters([6] * 8, 8, D_IN, seed=8)
    assert errors("alternating", adapters, 48).max() < 1e-6  # r_U = 8 and r_V = 44 then
    assert errors("diagonal", adapters, 8).mean() > 0.3
    assert errors("diagonal", adapters, 30).mean() < errors("diagonal", adapters, 8).mean() - 0.1
    assert errors("diagonal", adapters, 48).max() < 1e-5


@pytest.mark.parametrize("rank", [1, 2, 4, 16])
def test_a_cluster_for_each_adapter_is_truncation_of_each(rank: int) -> None:
    adapters = collection(REAL)
    stack = stack_of(adapters)
    for i, spectrum in enumerate(spectra(stack)):
        alone = stack.select([i])
        M, norm = dense(adapters[i]), float(stack.norms[i])
        cut = dense(truncate(*adapters[i], rank)) / norm
        assert np.linalg.norm(M / norm - cut) ** 2 == pytest.approx(spectrum[rank:].sum() / norm**2, abs=1e-6)
        for method, tolerance in (("eigenvalue", 2e-3), ("alternating", 2e-3), ("diagonal", 1e-5)):
            fit, best = METHODS[method]
            basis = fit(alone, rank, 0)
            lost = relative_errors(alone, basis, best(alone, basis)).item()
            assert lost == pytest.approx(spectrum[rank:].sum() / norm**2, abs=tolerance)
            if rank >= len(adapters[i][0]):
                assert lost < 1e-5


invariance = settings(derandomize=True, max_examples=4, deadline=None)
seeds = st.integers(0, 10_000)
changed_methods = pytest.mark.parametrize("method", ["alternating", "diagonal"])


def related(seed: int) -> list[Factors]:
    """A collection with one clear optimum for full cores, which every start finds."""
    return related_adapters(9, rank=3, shared=6, d_out=D_OUT, d_in=D_IN, seed=seed)


def assert_same_errors(
    method: str, plain: list[Factors], changed: list[Factors], order: list[int] | None = None
) -> None:
    before, after = errors(method, plain, 6), errors(method, changed, 6)
    assert 0.001 < before.mean() < 0.9
    if method == "diagonal":  # nothing is drawn, so the whole path is the same: adapter by adapter
        np.testing.assert_allclose(after, before if order is None else before[order], atol=5e-3)
    assert after.mean() == pytest.approx(before.mean(), abs=1e-3)


@changed_methods
@invariance
@given(seed=seeds, order=st.permutations(range(9)))
def test_the_order_of_adapters_does_not_matter(method: str, seed: int, order: list[int]) -> None:
    adapters = related(seed)
    assert_same_errors(method, adapters, [adapters[i] for i in order], order)


@changed_methods
@invariance
@given(seed=seeds, which=st.integers(0, 8), factor=st.floats(1e-6, 1e6), negative=st.booleans())
def test_an_adapters_own_scale_does_not_matter(
    method: str, seed: int, which: int, factor: float, negative: bool
) -> None:
    adapters = related(seed)
    A, B = adapters[which]
    scaled = [*adapters]
    scaled[which] = (A, B * (-factor if negative else factor))
    assert_same_errors(method, adapters, scaled)


@changed_methods
@invariance
@given(seed=seeds)
def test_how_an_adapter_is_factored_does_not_matter(method: str, seed: int) -> None:
    adapters = related(seed)
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for A, B in adapters:
        R = torch.randn(3, 3, generator=generator, dtype=torch.float64) + 3 * torch.eye(3, dtype=torch.float64)
        changed.append(((R @ A.double()).float(), (B.double() @ torch.linalg.inv(R)).float()))
    assert_same_errors(method, adapters, changed)


@changed_methods
@invariance
@given(seed=seeds)
def test_rotating_inputs_and_outputs_does_not_matter(method: str, seed: int) -> None:
    adapters = related(seed)
    left, right = rotation(D_OUT, seed), rotation(D_IN, seed + 1)
    rotated = [((A.double() @ right).float(), (left @ B.double()).float()) for A, B in adapters]
    assert_same_errors(method, adapters, rotated)
