"""The Triton kernels by Triton's interpreter, on the CPU, against a loop over tokens in float64.

The interpreter is chosen when Triton is imported, which other tests' libraries do: make test-vllm runs this file alone,
with TRITON_INTERPRET=1. On a machine with a GPU the same tests run the compiled kernels (make gpu-check).
"""

from __future__ import annotations

import importlib.util
import os
from itertools import product

import pytest
import torch
from torch import Tensor

from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex
from tests.support.stacks import put_cluster

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not here"),
    pytest.mark.skipif(
        not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="no GPU, and TRITON_INTERPRET=1 is not set",
    ),
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


def looped(x: Tensor, V: Tensor, U: list[Tensor], cores: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
    """Token by token, slice by slice, in float64."""
    R = U[0].shape[-1]
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
    from serve_app.engine.vllm.plugin.triton_kernel import add_sorted

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
    order = torch.argsort(positions, stable=True)
    starts = torch.searchsorted(positions[order], torch.arange(NUM_BASES + 1))
    arguments = [x, V, U, cores, order.int(), starts.int(), slots]
    add_sorted(out, *[[u.to(DEVICE) for u in a] if isinstance(a, list) else a.to(DEVICE) for a in arguments])
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


def test_the_plugins_index_and_stack_hand_the_kernel_what_it_needs() -> None:
    """A step, then a smaller one: what the first left in the index must not be read by the second."""
    settings = PluginSettings(3, 4, 6, ((8, 2),), False, "triton")
    index = TokenIndex(settings, 64, torch.device(DEVICE))
    stack = BasisStack(settings, 24, D_OUTS, torch.float32, torch.device(DEVICE))
    torch.manual_seed(0)
    for position in range(3):
        slices = [ModuleWeights(torch.randn(d, 6), torch.randn(24, 6), torch.randn(4, 6, 6)) for d in D_OUTS]
        put_cluster(stack, position, slices)
    places = {1 + 4 * position + slot: Place(position, slot) for position in range(3) for slot in range(4)}
    for ids in ([5, 0, 1, 12, 9, 5, 2, 0, 7], [3, 0, 3]):
        index.set(ids, places)
        x = torch.randn(16, 24, device=DEVICE)  # padded beyond the step's tokens
        out = torch.zeros(16, sum(D_OUTS), device=DEVICE)
        stack.add_triton(out, x, index)
        positions = torch.tensor([places[number].position if number else -1 for number in ids])
        weights = stack.V.cpu(), [u.cpu() for u in stack.U], stack.cores.cpu()
        expected = looped(x[: len(ids)].cpu(), *weights, positions, index.core_slots[: len(ids)].cpu())
        torch.testing.assert_close(out[: len(ids)].double().cpu(), expected, rtol=1e-4, atol=1e-3)
        assert not out[len(ids) :].any(), "padding was written"
