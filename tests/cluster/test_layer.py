"""The compressed layer against a loop over tokens in float64, written from the formula alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cluster.layer import ModuleWeights, TokenGroup, add_compressed_delta, group_tokens

D_IN, D_OUT, NUM_SLOTS = 48, 40, 12


def make_home(kind: str, r: int, seed: int, d_out: int = D_OUT) -> ModuleWeights:
    """A "stack" has fewer rows than slots, in another order: some slots do not touch the module."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "stack":
        U, V = torch.randn(9, d_out, r, generator=generator), torch.randn(9, r, D_IN, generator=generator).mT
        U[-1] = V[-1] = 0
        return ModuleWeights(U, V, None, torch.tensor([8, 3, 0, 8, 6, 7, 8, 5, 1, 2, 4, 8]))
    cores = {
        "full": torch.randn(NUM_SLOTS, r, r, generator=generator),
        "diagonal": torch.randn(NUM_SLOTS, r, generator=generator),
    }[kind]
    return ModuleWeights(torch.randn(d_out, r, generator=generator), torch.randn(D_IN, r, generator=generator), cores)


def reference(out: Tensor, x: Tensor, homes: list[str | None], slots: list[int], weights: dict) -> Tensor:
    """Token by token: y + U S V^T x."""
    result = out.double().clone()
    for t, (home, slot) in enumerate(zip(homes, slots, strict=True)):
        if home is None or home not in weights:
            continue
        w = weights[home]
        U, V = (w.U, w.V) if w.rows is None else (w.U[w.rows[slot]], w.V[w.rows[slot]])
        delta = U.double()
        if w.cores is not None:
            core = w.cores[slot].double()
            delta = delta @ (torch.diag(core) if core.dim() == 1 else core)
        result[t] += delta @ V.double().T @ x[t].double()
    return result


def slots_of(pattern: str, num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    if pattern == "distinct":
        return [t % NUM_SLOTS for t in range(num_tokens)]
    if pattern == "identical":
        return [3] * num_tokens
    popularity = torch.ones(NUM_SLOTS) if pattern == "uniform" else 1 / torch.arange(1, NUM_SLOTS + 1) ** 1.5
    return torch.multinomial(popularity, num_tokens, replacement=True, generator=generator).tolist()


def run(out: Tensor, x: Tensor, homes: list[str | None], slots: list[int], weights: dict) -> Tensor:
    groups = group_tokens(homes, slots, [1] * len(homes), "cpu")
    return add_compressed_delta(out.clone(), x, groups, weights)


def random_batch(num_tokens: int, d_out: int = D_OUT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(num_tokens, d_out, generator=generator), torch.randn(num_tokens, D_IN, generator=generator)


@pytest.mark.parametrize("kind", ["full", "diagonal", "stack"])
@pytest.mark.parametrize("pattern", ["distinct", "uniform", "zipf", "identical"])
@pytest.mark.parametrize("r", [1, 4, 16])
def test_one_home_adds_what_the_formula_says(kind: str, pattern: str, r: int) -> None:
    num_tokens = NUM_SLOTS  # as many as slots, so that "distinct" is
    weights = {"cluster:0": make_home(kind, r, seed=r)}
    out, x = random_batch(num_tokens)
    slots = slots_of(pattern, num_tokens)
    homes: list[str | None] = ["cluster:0"] * num_tokens
    torch.testing.assert_close(
        run(out, x, homes, slots, weights).double(), reference(out, x, homes, slots, weights), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("pattern", ["distinct", "uniform", "zipf", "identical"])
def test_homes_of_every_kind_and_rank_mix_with_base_rows(pattern: str) -> None:
    weights = {
        "cluster:0": make_home("full", 8, seed=1),
        "cluster:1": make_home("full", 3, seed=2),
        "cluster:2": make_home("diagonal", 5, seed=3),
        "factors:2.0": make_home("stack", 2, seed=4),
        "factors:6.0": make_home("stack", 6, seed=5),
    }
    choices: list[str | None] = [None, *weights]
    homes = [choices[(t * 7) % 6] for t in range(40)]
    out, x = random_batch(40)
    slots = slots_of(pattern, 40)
    seen = run(out, x, homes, slots, weights)
    torch.testing.assert_close(seen.double(), reference(out, x, homes, slots, weights), rtol=1e-4, atol=1e-3)
    base_rows = [t for t, home in enumerate(homes) if home is None]
    assert base_rows
    assert torch.equal(seen[base_rows], out[base_rows]), "base rows must be the base's, bit for bit"


@pytest.mark.parametrize("lengths", [[4, 4, 4, 4], [4, 1, 2, 4]])
def test_sequences_on_stacks_add_what_the_formula_says(lengths: list[int]) -> None:
    """One gather a sequence where they are of one length, a gather a token else: the same."""
    weights = {"factors:3.0": make_home("stack", 3, seed=1), "cluster:0": make_home("full", 4, seed=2)}
    homes, slots = ["factors:3.0", "cluster:0", "factors:3.0", "factors:3.0"], [2, 5, 2, 4]
    out, x = random_batch(sum(lengths))
    groups = group_tokens(homes, slots, lengths, "cpu")
    assert [group.length for group in groups] == ([4, 4] if len(set(lengths)) == 1 else [1, 1])
    seen = add_compressed_delta(out.clone(), x, groups, weights)
    by_token = [[value] * length for value, length in zip(zip(homes, slots, strict=True), lengths, strict=True)]
    token_homes, token_slots = zip(*[pair for own in by_token for pair in own], strict=True)
    expected = reference(out, x, list(token_homes), list(token_slots), weights)
    torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-3)


def test_a_slot_never_meets_another_slots_factors() -> None:
    clean = make_home("stack", 4, seed=1)
    assert clean.rows is not None
    poisoned = ModuleWeights(clean.U.clone(), clean.V.clone(), None, clean.rows)
    poisoned.U[clean.rows[5]] = poisoned.V[clean.rows[5]] = torch.nan
    out, x = random_batch(4)
    homes: list[str | None] = ["factors:4.0"] * 4
    seen = run(out, x, homes, [4, 5, 2, 0], {"factors:4.0": poisoned})
    expected = run(out, x, homes, [4, 5, 2, 0], {"factors:4.0": clean})
    assert torch.equal(seen[[0, 2, 3]], expected[[0, 2, 3]])
    assert seen[1].isnan().all()
    assert torch.equal(seen[3], out[3]), "a slot that does not touch the module leaves its token as it was"


def test_a_token_never_meets_another_homes_basis() -> None:
    weights = {"cluster:0": make_home("full", 4, seed=1), "cluster:1": make_home("full", 4, seed=2)}
    poisoned = {
        "cluster:0": weights["cluster:0"],
        "cluster:1": ModuleWeights(
            *(
                torch.full_like(tensor, torch.nan)
                for tensor in vars(weights["cluster:1"]).values()
                if tensor is not None
            )
        ),
    }
    homes: list[str | None] = ["cluster:0", "cluster:1", None, "cluster:0"]
    out, x = random_batch(4)
    slots = [1, 2, 0, 3]
    clean, seen = run(out, x, homes, slots, weights), run(out, x, homes, slots, poisoned)
    assert torch.equal(seen[[0, 2, 3]], clean[[0, 2, 3]])
    assert seen[1].isnan().all()


def test_a_slot_never_meets_another_slots_core() -> None:
    clean = make_home("full", 4, seed=1)
    assert clean.cores is not None
    cores = clean.cores.clone()
    cores[5] = torch.nan
    out, x = random_batch(3)
    homes: list[str | None] = ["cluster:0"] * 3
    seen = run(out, x, homes, [4, 5, 6], {"cluster:0": ModuleWeights(clean.U, clean.V, cores)})
    expected = run(out, x, homes, [4, 5, 6], {"cluster:0": clean})
    assert torch.equal(seen[[0, 2]], expected[[0, 2]])
    assert seen[1].isnan().all()


def test_a_home_without_the_module_leaves_it_alone() -> None:
    out, x = random_batch(2)
    weights = {"cluster:0": make_home("full", 4, seed=1)}
    seen = run(out, x, ["cluster:1", "cluster:0"], [0, 0], weights)
    assert torch.equal(seen[0], out[0])
    assert not torch.equal(seen[1], out[1])


def test_packed_projections_are_the_slices_side_by_side() -> None:
    """An engine with one q/k/v product hands slices of its output: each is changed in place, unchanged elsewhere."""
    widths = {"q": 24, "k": 8, "v": 8}
    parts = {
        name: {"cluster:0": make_home("full", 4, seed, width)} for seed, (name, width) in enumerate(widths.items())
    }
    homes: list[str | None] = ["cluster:0", None, "cluster:0"]
    slots = [2, 0, 9]
    packed, x = random_batch(3, d_out=sum(widths.values()))
    expected = torch.cat(
        [
            reference(out, x, homes, slots, parts[name])
            for name, out in zip(parts, packed.split([24, 8, 8], dim=1), strict=True)
        ],
        dim=1,
    )
    groups = group_tokens(homes, slots, [1] * 3, "cpu")
    for name, out in zip(parts, packed.split([24, 8, 8], dim=1), strict=True):
        add_compressed_delta(out, x, groups, parts[name])
    torch.testing.assert_close(packed.double(), expected, rtol=1e-4, atol=1e-3)


def test_bfloat16_stays_within_its_own_rounding() -> None:
    exact = {"cluster:0": make_home("full", 8, seed=1)}
    weights = {home: w.to("cpu", torch.bfloat16) for home, w in exact.items()}
    out, x = (tensor.bfloat16() for tensor in random_batch(16))
    homes: list[str | None] = ["cluster:0"] * 16
    slots = slots_of("uniform", 16)
    expected = reference(out, x, homes, slots, weights)
    seen = run(out, x, homes, slots, weights)
    assert seen.dtype == torch.bfloat16
    assert (seen.double() - expected).norm() / expected.norm() < 0.01


def test_sequences_laid_end_to_end_are_grouped_token_by_token() -> None:
    groups = group_tokens(["cluster:1", None, "cluster:0", "cluster:1"], [5, 0, 2, 7], [2, 3, 1, 2], "cpu")
    by_home = {group.home: (group.rows.tolist(), group.slots.tolist()) for group in groups}
    assert by_home == {"cluster:1": ([0, 1, 6, 7], [5, 5, 7, 7]), "cluster:0": ([5], [2])}
    assert all(isinstance(group, TokenGroup) and group.rows.dtype == torch.int64 for group in groups)


def test_a_batch_of_base_rows_has_no_groups() -> None:
    assert group_tokens([None, None], [0, 0], [4, 1], "cpu") == []
