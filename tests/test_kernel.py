"""The Triton kernels by Triton's interpreter, on the CPU, against a loop over tokens in float64.

On a machine with a GPU the same tests run the compiled kernels (make gpu-check).
"""

from __future__ import annotations

import importlib.util
import os
from itertools import product

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D_OUTS = (40, 24, 24)
NUM_BASES, SLOTS_EACH = 5, 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def popular(kind: str, num_tokens: int) -> Tensor:
    """Each token's basis, -1 for none."""
    generator = torch.Generator().manual_seed(num_tokens)
    if kind == "one basis":
        return torch.full((num_tokens,), 3)
    if kind == "uniform":
        return torch.randint(0, NUM_BASES, (num_tokens,), generator=generator)
    if kind == "skewed":
        weights = torch.arange(1, NUM_BASES + 1) ** -1.5
        return torch.multinomial(weights, num_tokens, replacement=True, generator=generator)
    assert kind == "with base rows"
    return torch.randint(-1, NUM_BASES, (num_tokens,), generator=generator)


def looped(
    x: Tensor, V: Tensor, U: list[Tensor], cores: Tensor, positions: Tensor, slots: Tensor
) -> Tensor:
    """Token by token, slice by slice, in float64."""
    n, R = len(U), U[0].shape[-1]
    out = torch.zeros(len(x), sum(u.shape[2] for u in U), dtype=torch.float64)
    for t, c in enumerate(positions.tolist()):
        if c < 0:
            continue
        start = 0
        for i, u in enumerate(U):
            core = cores[slots[t], i].double()
            S = torch.diag(core) if core.dim() == 1 else core
            own_V = V[c, 0, i * R : (i + 1) * R].double()
            out[t, start : start + u.shape[2]] = u[c, 0].double() @ (S @ (own_V @ x[t].double()))
            start += u.shape[2]
    return out


def compare(
    kind: str, rank: int, num_tokens: int, dtype: torch.dtype, diagonal: bool = False, n: int = 3, d_in: int = 96
) -> None:
    from serve_app.vllm_plugin.kernel import add_sorted, sorted_tokens

    torch.manual_seed(rank + num_tokens)
    scale = d_in**-0.5
    x = torch.randn(num_tokens, d_in).to(dtype)
    V = (torch.randn(NUM_BASES + 1, 1, n * rank, d_in) * scale).to(dtype)
    U = [torch.randn(NUM_BASES + 1, 1, d_out, rank).to(dtype) for d_out in D_OUTS[:n]]
    shape = (rank,) if diagonal else (rank, rank)
    cores = (torch.randn(NUM_BASES * SLOTS_EACH + 1, n, *shape) / rank).to(dtype)
    positions = popular(kind, num_tokens)
    slots = torch.where(positions < 0, NUM_BASES * SLOTS_EACH, positions * SLOTS_EACH + torch.arange(num_tokens) % 4)
    before = torch.randn(num_tokens, sum(D_OUTS[:n])).to(dtype)
    expected = before.double() + looped(x, V, U, cores, positions, slots)
    out = before.to(DEVICE, copy=True)
    mixed = torch.full((num_tokens, n, rank), torch.nan, device=DEVICE)
    tokens = sorted_tokens(positions.to(DEVICE), slots.to(DEVICE), NUM_BASES)
    add_sorted(out, x.to(DEVICE), V.to(DEVICE), [u.to(DEVICE) for u in U], cores.to(DEVICE), tokens, mixed)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(out.cpu()[positions < 0], before[positions < 0]), "rows without a basis are exactly the base's"


@pytest.mark.parametrize(
    ("kind", "rank", "num_tokens", "dtype"),
    list(
        product(
            ("one basis", "uniform", "skewed", "with base rows"),
            (8, 16, 64),
            (1, 5, 33),
            (torch.float32, torch.bfloat16),
        )
    ),
)
def test_the_kernel_adds_each_tokens_delta_over_the_grid(
    kind: str, rank: int, num_tokens: int, dtype: torch.dtype
) -> None:
    compare(kind, rank, num_tokens, dtype)


def test_rank_128_and_ranks_that_are_no_power_of_two() -> None:
    compare("uniform", 128, 17, torch.bfloat16)
    compare("uniform", 24, 17, torch.float32)


def test_float16() -> None:
    compare("uniform", 16, 17, torch.float16)


def test_diagonal_cores() -> None:
    compare("with base rows", 16, 33, torch.float32, diagonal=True)
    compare("skewed", 12, 7, torch.bfloat16, diagonal=True)


@pytest.mark.parametrize("n", [1, 2])
def test_layers_of_one_and_two_slices(n: int) -> None:
    compare("with base rows", 16, 19, torch.float32, n=n)


def test_prefill_takes_blocks_of_64_tokens() -> None:
    compare("skewed", 16, 300, torch.float32)


def test_widths_that_no_block_divides() -> None:
    compare("uniform", 16, 9, torch.float32, d_in=131)
