"""The factor stack against dense products: what it holds, what it leaves out, and that nobody spoils another's rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.compression.stack import stack_factors
from tests.support.dense import Factors, dense, random_adapters, stack_of

D_OUT, D_IN = 20, 31
RANKS = (3, 1, 5, 2)


pytestmark = pytest.mark.usefixtures("one_thread")


def adapters(seed: int = 0) -> list[Factors]:
    return random_adapters(RANKS, D_OUT, D_IN, seed)


def cancelling(seed: int) -> Factors:
    """Rank 3 of nonzero rows, and B A = 0 but for rounding."""
    a, b = random_adapters([1], D_OUT, D_IN, seed)[0]
    return torch.cat([a, a, -2 * a]), torch.cat([b, b, b], dim=1)


def test_a_stack_is_every_adapter_at_unit_norm_beside_its_norm() -> None:
    stack = stack_of(adapters())
    assert stack.A.dtype == stack.B.dtype == torch.float32
    assert (stack.ranks, stack.members, stack.num_adapters) == (RANKS, (0, 1, 2, 3), 4)
    starts = np.cumsum([0, *RANKS])
    for i, factors in enumerate(adapters()):
        own = slice(starts[i], starts[i + 1])
        M, norm = dense(factors), float(stack.norms[i])
        assert norm == pytest.approx(np.linalg.norm(M), rel=1e-12)
        unit = dense((stack.A[own], stack.B[own].T))
        np.testing.assert_allclose(unit * norm, M, atol=1e-6 * norm)


@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (3, 0)])
def test_grams_are_those_of_each_adapters_rows(chosen: tuple[int, ...]) -> None:
    stack = stack_of(adapters()).select(chosen)
    R, starts = max(stack.ranks), np.cumsum([0, *stack.ranks])
    for rows, grams in ((stack.A, stack.gram_A), (stack.B, stack.gram_B)):
        assert grams.shape == (len(chosen), R, R)
        for i, rank in enumerate(stack.ranks):
            own = rows[starts[i] : starts[i + 1]].double().numpy()
            np.testing.assert_allclose(grams[i, :rank, :rank], own @ own.T, rtol=1e-5, atol=1e-7)
            assert not grams[i, rank:].any()
            assert not grams[i, :, rank:].any()


@pytest.mark.parametrize("scale_A", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("scale_B", [1e-12, 1.0, 1e12])
def test_no_scale_overflows_or_touches_the_neighbours(scale_A: float, scale_B: float) -> None:
    plain = adapters()
    A, B = plain[2]
    scaled = [*plain[:2], (A * scale_A, B * scale_B), plain[3]]
    expected, seen = stack_of(plain), stack_of(scaled)
    assert float(seen.norms[2]) == pytest.approx(np.linalg.norm(dense(scaled[2])), rel=1e-12)
    own = slice(4, 9)
    np.testing.assert_allclose(
        dense((seen.A[own], seen.B[own].T)), dense((expected.A[own], expected.B[own].T)), atol=1e-6
    )
    others = [0, 1, 3]
    for ours, theirs in zip(vars(seen.select(others)).values(), vars(expected.select(others)).values(), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def test_rows_of_very_different_scale_keep_their_product() -> None:
    A, B = adapters()[0]
    d = torch.tensor([1e12, 1.0, 1e-12])
    stack = stack_of([(A * d.unsqueeze(1), B / d)])
    np.testing.assert_allclose(dense((stack.A, stack.B.T)) * float(stack.norms), dense((A, B)), atol=1e-5)


def test_adapters_of_zero_norm_are_left_out_and_the_others_keep_their_numbers() -> None:
    zero_A, zero_B = torch.zeros(2, D_IN), torch.zeros(D_OUT, 2)
    A, B = random_adapters([2], D_OUT, D_IN, seed=9)[0]
    some = adapters()
    stack = stack_factors([(0, (zero_A, B)), (1, some[0]), (2, (A, zero_B)), (3, (zero_A, zero_B)), (7, some[1])])
    assert stack is not None
    assert (stack.members, stack.ranks) == ((1, 7), RANKS[:2])
    without = stack_of(some[:2])
    assert torch.equal(stack.A, without.A)
    assert torch.equal(stack.B, without.B)
    assert stack_factors([(0, (zero_A, B)), (1, (A, zero_B))]) is None


def test_an_adapter_whose_product_cancels_counts_as_zero() -> None:
    # The energy computed for these is rounding, of either sign.
    assert stack_factors([(seed, cancelling(seed)) for seed in range(50)]) is None
    stack = stack_factors([(0, cancelling(0)), (1, adapters()[0]), (2, cancelling(1))])
    assert stack is not None
    assert stack.members == (1,)


def test_padding_puts_each_adapters_rows_at_its_place_and_zeros_below() -> None:
    stack = stack_of(adapters())
    rows = torch.arange(1.0, sum(RANKS) * 4 + 1).view(-1, 4)
    padded = stack.padded(rows)
    assert padded.shape == (4, max(RANKS), 4)
    start = 0
    for i, rank in enumerate(RANKS):
        assert torch.equal(padded[i, :rank], rows[start : start + rank])
        assert not padded[i, rank:].any()
        start += rank
    assert torch.equal(stack.unpadded(padded), rows)


@pytest.mark.parametrize("indices", [[0], [2], [3, 1], [0, 1, 2, 3], [2, 0, 3]])
def test_a_selection_is_the_stack_of_the_selected_alone(indices: list[int]) -> None:
    some = adapters()
    whole = stack_factors([(10 + i, factors) for i, factors in enumerate(some)])
    alone = stack_factors([(10 + i, some[i]) for i in indices])
    assert whole is not None
    assert alone is not None
    selected = whole.select(indices)
    assert (selected.ranks, selected.members) == (alone.ranks, alone.members)
    for name in ("A", "B", "norms"):
        assert torch.equal(getattr(selected, name), getattr(alone, name)), name
    rows = torch.randn(sum(alone.ranks), 3)
    assert torch.equal(selected.unpadded(selected.padded(rows)), rows)
