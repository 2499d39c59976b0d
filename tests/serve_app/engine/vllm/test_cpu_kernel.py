"""The CPU kernel against a loop over tokens in float64, on two threads; make test-vllm runs it (Numba is vLLM's)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch

from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import MAX_TASK_TOKENS, Place, Tasks, TokenIndex
from tests.support.stacks import put_cluster

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vLLM"),
]

CPU = torch.device("cpu")
NUM_BASES, SLOTS_EACH = 5, 4


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def popular(kind: str, num_tokens: int) -> list[tuple[int, int] | None]:
    """Each token's basis and slot, None for the base."""
    random = np.random.default_rng(num_tokens)
    weights = {"one basis": [0, 0, 0, 1, 0], "skewed": [1, 2**-1.5, 3**-1.5, 4**-1.5, 5**-1.5]}.get(kind, [1] * 5)
    bases = random.choice(NUM_BASES, num_tokens, p=np.array(weights) / sum(weights))
    bare = random.random(num_tokens) < (0.3 if kind == "with base rows" else 0)
    return [None if bare[t] else (int(basis), int(random.integers(SLOTS_EACH))) for t, basis in enumerate(bases)]


def compare(
    kind: str,
    rank: int,
    num_tokens: int,
    diagonal: bool = False,
    d_in: int = 97,
    d_outs: tuple[int, ...] = (40, 24, 24),
) -> None:
    torch.manual_seed(rank + num_tokens)
    settings = PluginSettings(NUM_BASES, SLOTS_EACH, rank, (), diagonal, "numba")
    stack, index = BasisStack(settings, d_in, d_outs, torch.float32, CPU), TokenIndex(settings, 4096, CPU)
    core = (SLOTS_EACH, rank) if diagonal else (SLOTS_EACH, rank, rank)
    clusters = [
        [
            ModuleWeights(torch.randn(d, rank), torch.randn(d_in, rank) * d_in**-0.5, torch.randn(core) / rank)
            for d in d_outs
        ]
        for _ in range(NUM_BASES)
    ]
    asked = popular(kind, num_tokens)
    for position, slices in enumerate(clusters):
        put_cluster(stack, position, slices)
        if position not in {own[0] for own in asked if own}:
            for tensor in (stack.V, *stack.U):
                tensor[position] = torch.nan  # a basis that nobody asks for reaches nobody
    places = {1 + p * SLOTS_EACH + s: Place(p, s) for p in range(NUM_BASES) for s in range(SLOTS_EACH)}
    index.set([0 if own is None else 1 + own[0] * SLOTS_EACH + own[1] for own in asked], places)
    x, before = torch.randn(num_tokens, d_in), torch.randn(num_tokens, sum(d_outs))
    out, expected = before.clone(), before.double()
    if index.on_bases is not None:
        stack.add_sorted(out, x, index.on_bases)
    for t, own in enumerate(asked):
        parts = expected[t].split(d_outs)
        for i, part in enumerate(parts if own is not None else ()):
            position, slot = asked[t] or (0, 0)
            weights = clusters[position][i]
            assert weights.cores is not None
            S = weights.cores[slot].double()
            mixed = (
                S @ (weights.V.double().T @ x[t].double())
                if not diagonal
                else S * (weights.V.double().T @ x[t].double())
            )
            part += weights.U.double() @ mixed
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    bare = [t for t, own in enumerate(asked) if own is None]
    assert torch.equal(out[bare], before[bare]), "rows without a basis are exactly the base's"


@pytest.mark.parametrize(
    ("kind", "rank", "num_tokens", "diagonal"),
    list(product(("one basis", "uniform", "skewed", "with base rows"), (8, 16, 64), (1, 5, 33), (False, True))),
)
def test_the_kernel_adds_each_tokens_delta_over_the_grid(kind: str, rank: int, num_tokens: int, diagonal: bool) -> None:
    compare(kind, rank, num_tokens, diagonal)


@pytest.mark.parametrize("rank", [1, 2, 3, 7, 13])
def test_ranks_that_no_unrolled_loop_divides(rank: int) -> None:
    compare("uniform", rank, 17)
    compare("uniform", rank, 17, diagonal=True)


@pytest.mark.parametrize("d_outs", [(31,), (48, 48)])
def test_layers_of_one_and_two_slices(d_outs: tuple[int, ...]) -> None:
    compare("with base rows", 16, 19, d_outs=d_outs)


def test_prefill_has_many_tasks_a_basis() -> None:
    compare("skewed", 16, 700)


def test_a_stack_compiles_the_kernel_before_the_first_request() -> None:
    from serve_app.engine.vllm.plugin.cpu_kernel import add_tasks

    compare("uniform", 16, 5)
    compare("uniform", 16, 5, diagonal=True)
    compiled = len(add_tasks.signatures)
    assert compiled == 2, "one for full cores, one for diagonal ones"
    compare("one basis", 8, 40, d_in=64, d_outs=(16,))
    assert len(add_tasks.signatures) == compiled


def test_torch_keeps_its_number_of_threads() -> None:
    """The trap: Numba starts its threads through the same OpenMP, whose number is torch's too."""
    compare("uniform", 16, 33)
    assert torch.get_num_threads() == 2


def test_rows_of_a_wider_tensor_are_read_where_they_are() -> None:
    settings = PluginSettings(1, 1, 4, (), False, "numba")
    stack, index = BasisStack(settings, 8, (8,), torch.float32, CPU), TokenIndex(settings, 16, CPU)
    weights = ModuleWeights(torch.randn(8, 4), torch.randn(8, 4), torch.randn(1, 4, 4))
    put_cluster(stack, 0, [weights])
    index.set([1, 1, 1], {1: Place(0, 0)})
    wide, out = torch.randn(3, 20), torch.zeros(3, 8)
    assert index.on_bases is not None
    assert weights.cores is not None
    stack.add_sorted(out, wide[:, 4:12], index.on_bases)
    torch.testing.assert_close(out, wide[:, 4:12] @ weights.V @ weights.cores[0].T @ weights.U.T, rtol=1e-4, atol=1e-4)


def test_an_index_of_another_step_is_refused_before_anything_is_written() -> None:
    settings = PluginSettings(1, 1, 4, (), False, "numba")
    stack, index = BasisStack(settings, 8, (8,), torch.float32, CPU), TokenIndex(settings, 16, CPU)
    index.set([1, 1, 1], {1: Place(0, 0)})
    assert index.on_bases is not None
    with pytest.raises(IndexError, match="2 tokens came with the index of a step of 3"):
        stack.add_sorted(torch.zeros(2, 8), torch.zeros(2, 8), index.on_bases)


def test_tasks_are_short_and_hold_every_token_once() -> None:
    sizes = np.array([0, 1, MAX_TASK_TOKENS, 0, 2 * MAX_TASK_TOKENS + 1])
    total = int(sizes.sum())
    tasks = Tasks.make(np.array([0, 10, 20, 30, 40]), sizes, np.arange(total), np.arange(total), total)
    lengths = np.diff(tasks.starts)
    assert tasks.positions.tolist() == [10, 20, 40, 40, 40]
    assert lengths.tolist() == [1, MAX_TASK_TOKENS, MAX_TASK_TOKENS, MAX_TASK_TOKENS, 1]
    assert tasks.starts[0] == 0
    assert tasks.starts[-1] == total
