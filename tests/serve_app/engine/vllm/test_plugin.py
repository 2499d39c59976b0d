"""The plugin's own parts, which need no vLLM: the token index and the stacks, against loops in float64."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import ConfigError
from cluster.layer import ModuleWeights
from serve_app.app import choose_engine
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.register import register
from serve_app.engine.vllm.plugin.settings import SECTION, PluginSettings, slot_rank
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex, read_path, write_path

D_IN, D_OUTS = 24, (16, 8, 8)
CPU = torch.device("cpu")
NUMBA = pytest.param(
    "numba",
    marks=[pytest.mark.vllm, pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vLLM")],
)


def settings(products: str = "grouped", clusters: int = 3, diagonal: bool = False) -> PluginSettings:
    return PluginSettings(clusters, 4, 6, 2, diagonal, products)  # type: ignore[arg-type]


class Kernels:
    """vLLM's shrink and expand, as loops: token t uses slot ids[t] - 1, none for 0."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids

    def add_shrink(self, out: Tensor, x: Tensor, A: tuple[Tensor, ...], scale: float) -> None:
        for t, i in itertools.product([t for t, number in enumerate(self.ids) if number], range(len(A))):
            out[i, t] += scale * (A[i][self.ids[t] - 1, 0].float() @ x[t].float())

    def add_expand(
        self, out: Tensor, h: Tensor, B: tuple[Tensor, ...], sizes: tuple[int, ...], add_inputs: bool
    ) -> None:
        assert add_inputs
        for t in [t for t, number in enumerate(self.ids) if number]:
            start = 0
            for i, size in enumerate(sizes):
                out[t, start : start + size] += (B[i][self.ids[t] - 1, 0].float() @ h[i, t]).to(out.dtype)
                start += size


def random_cluster(rank: int, diagonal: bool, skip: int | None = None) -> list[ModuleWeights | None]:
    """One entry a slice; slice ``skip`` is not touched."""
    core = (4, rank) if diagonal else (4, rank, rank)
    return [
        None if i == skip else ModuleWeights(torch.randn(d_out, rank), torch.randn(D_IN, rank), torch.randn(core))
        for i, d_out in enumerate(D_OUTS)
    ]


def expected(x: Tensor, places: list[Place | None], clusters: list[list[ModuleWeights | None]]) -> Tensor:
    """Token by token, slice by slice, in float64, from the clusters' own weights."""
    out = torch.zeros(len(x), sum(D_OUTS), dtype=torch.float64)
    for t, place in enumerate(places):
        if place is None or place.position is None:
            continue
        start = 0
        for i, d_out in enumerate(D_OUTS):
            own = clusters[place.position][i]
            if own is not None and own.cores is not None:
                core = own.cores[place.slot].double()
                S = torch.diag(core) if core.dim() == 1 else core
                out[t, start : start + d_out] = own.U.double() @ S @ own.V.double().T @ x[t].double()
            start += d_out
    return out


BATCHES = {
    "all of one cluster": [3, 1, 3, 3, 2],
    "several clusters": [1, 5, 9, 12, 1, 6],
    "base, clusters and a raw adapter": [0, 1, 0, 9, 13, 5, 0],
    "base alone": [0, 0],
}


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("products", ["grouped", NUMBA, "static"])
@pytest.mark.parametrize("batch", BATCHES)
def test_each_token_gets_its_own_adapters_delta_and_no_other(batch: str, products: str, diagonal: bool) -> None:
    torch.manual_seed(0)
    own = settings(products, diagonal=diagonal)
    clusters = [random_cluster(6, diagonal), random_cluster(3, diagonal, skip=1), random_cluster(5, diagonal)]
    stack = BasisStack(own, D_IN, D_OUTS, torch.float32, CPU)
    for position, slices in enumerate(clusters):
        stack.put(position, slices)
    places = {1 + position * 4 + slot: Place(position, slot) for position in range(3) for slot in range(4)}
    places[13] = Place(None, 1)
    index, ids = TokenIndex(own, 16, CPU), BATCHES[batch]
    positions = index.set(ids, places)
    x, out = torch.randn(len(ids), D_IN), torch.zeros(len(ids), sum(D_OUTS))
    if products == "static":
        stack.add_static(out, x, index.core_slots[: len(ids)], Kernels(positions))
    elif index.on_bases is not None:
        stack.add_sorted(out, x, index.on_bases)
    want = expected(x, [places.get(number) for number in ids], clusters)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-3)
    untouched = [t for t, number in enumerate(ids) if number in (0, 13)]
    assert not out[untouched].any(), "rows without a basis are exactly the base's"


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("products", ["grouped", NUMBA])
def test_truncated_and_raw_adapters_of_any_rank_share_a_stack_and_meet_only_their_own_rows(
    products: str, diagonal: bool
) -> None:
    torch.manual_seed(0)
    own = settings(products, diagonal=diagonal)
    stack, index = BasisStack(own.of_factors(8), D_IN, D_OUTS, torch.float32, CPU), TokenIndex(own, 16, CPU)
    adapters = [
        [
            None if i == skip else ModuleWeights(torch.randn(d, rank), torch.randn(D_IN, rank), None)
            for i, d in enumerate(D_OUTS)
        ]
        for rank, skip in ((8, None), (3, 1))
    ]
    for slot, slices in enumerate(adapters):
        stack.put(slot, slices)
    places = {1: Place(0, 0), 13: Place(None, 0), 14: Place(None, 1)}
    for ids in ([14, 0, 13, 1, 14, 14, 0], [13, 13]):
        index.set(ids, places)
        x, out, expected = torch.randn(len(ids), D_IN), torch.zeros(len(ids), sum(D_OUTS)), []
        assert index.on_factors is not None
        stack.add_sorted(out, x, index.on_factors)
        for t, number in enumerate(ids):
            slices = adapters[number - 13] if number >= 13 else [None] * 3
            parts = [torch.zeros(d) if w is None else w.U @ (w.V.T @ x[t]) for w, d in zip(slices, D_OUTS, strict=True)]
            expected.append(torch.cat(parts))
        torch.testing.assert_close(out, torch.stack(expected), rtol=1e-4, atol=1e-3)
    index.set([1, 0], places)
    assert index.on_factors is None


def test_static_products_with_one_cluster_need_no_kernels() -> None:
    torch.manual_seed(0)
    own = settings("static", clusters=1)
    stack, cluster = BasisStack(own, D_IN, D_OUTS, torch.float32, CPU), random_cluster(6, False)
    stack.put(0, cluster)
    index = TokenIndex(own, 16, CPU)
    index.set([2, 0, 4], {2: Place(0, 1), 4: Place(0, 3)})
    x, out = torch.randn(3, D_IN), torch.zeros(3, sum(D_OUTS))
    stack.add_static(out, x, index.core_slots[:3], None)
    torch.testing.assert_close(
        out.double(), expected(x, [Place(0, 1), None, Place(0, 3)], [cluster]), rtol=1e-4, atol=1e-3
    )
    assert not out[1].any()


def test_padded_tokens_read_a_slot_that_is_zero() -> None:
    """The trap: a captured graph and padding read the index buffer behind the batch's tokens."""
    own = settings("static")
    index = TokenIndex(own, 16, CPU)
    index.set(list(range(1, 13)), {1 + p * 4 + s: Place(p, s) for p in range(3) for s in range(4)})
    index.set([5], {5: Place(1, 0)})
    assert index.core_slots[0] == 4
    assert (index.core_slots[1:] == index.zero_slot).all()
    stack = BasisStack(own, D_IN, D_OUTS, torch.float32, CPU)
    for position in range(3):
        stack.put(position, random_cluster(6, False))
    assert not stack.cores[index.zero_slot].any()
    assert not stack.V[-1].any(), "index -1 means the last position to vLLM's CPU kernels"


def test_a_position_that_is_used_again_holds_nothing_of_its_last_cluster() -> None:
    stack = BasisStack(settings(), D_IN, D_OUTS, torch.float32, CPU)
    stack.put(1, random_cluster(6, False))
    stack.put(1, random_cluster(2, False, skip=0))
    fresh = BasisStack(settings(), D_IN, D_OUTS, torch.float32, CPU)
    assert not stack.U[0][1].any()
    stack.clear(1)
    for mine, its in zip([stack.V, stack.cores, *stack.U], [fresh.V, fresh.cores, *fresh.U], strict=True):
        assert torch.equal(mine, its)


class CountingPlaces(dict[int, Place]):
    """How often a step looks an adapter up; iterating over all of them is counted as that many looks."""

    looks = 0

    def __getitem__(self, key: int) -> Place:
        self.looks += 1
        return super().__getitem__(key)

    def __iter__(self) -> Any:
        self.looks += len(self)
        return super().__iter__()


def test_a_step_costs_no_more_with_10000_registered_adapters_than_with_64() -> None:
    """The trap: stock vLLM lists every registered adapter for each active one in each step."""
    looks = []
    for registered in (64, 10_000):
        index = TokenIndex(PluginSettings(1, registered, 6, 0, False, "grouped"), 256, CPU)
        places = CountingPlaces({number: Place(0, number - 1) for number in range(1, registered + 1)})
        index.set([1 + t % 64 for t in range(256)], places)
        looks.append(places.looks)
    assert looks == [64, 64]


def test_a_place_survives_the_wire_as_a_path() -> None:
    assert read_path(write_path("factors:tenant/odd#one", 0)) == ("factors:tenant/odd#one", 0)
    assert read_path(write_path("cluster:12", 345)) == ("cluster:12", 345)
    with pytest.raises(ValueError, match="not written by this project"):
        read_path("/some/lora")


def test_settings_survive_and_a_section_that_is_not_ours_is_refused() -> None:
    own = settings()
    assert PluginSettings.of(own.to_config()) == own
    assert PluginSettings.of({}) is None
    assert PluginSettings.of({"other": 1}) is None
    with pytest.raises(ConfigError, match="extra"):
        PluginSettings.of({SECTION: own.to_config()[SECTION] | {"extra": 1}})


def test_a_rank_takes_the_smallest_slot_that_vllm_has_and_beyond_is_refused() -> None:
    assert [slot_rank(rank) for rank in (1, 8, 9, 64, 300, 512)] == [8, 8, 16, 64, 320, 512]
    with pytest.raises(ConfigError, match="rank 513"):
        slot_rank(513)


@pytest.mark.skipif(compatibility.vllm_version() is not None, reason="vLLM is installed here")
def test_without_vllm_the_engine_is_refused_by_name_and_auto_takes_transformers() -> None:
    assert choose_engine("auto") == "transformers"
    register()  # inert
    for refusing in (compatibility.check, lambda: choose_engine("vllm")):
        with pytest.raises(ConfigError, match=r"vLLM is not installed here.*make vllm-cpu"):
            refusing()


def test_a_missing_symbol_is_named_with_the_versions_that_were_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: vLLM's LoRA code changes a lot between versions."""
    monkeypatch.setattr(compatibility, "vllm_version", lambda: "0.99.0")
    monkeypatch.setattr(compatibility, "SYMBOLS", {"json": ("JSONDecoder.no_such_method", "dumps")})
    with pytest.raises(ConfigError, match=r"vLLM 0\.99\.0 has no json\.JSONDecoder\.no_such_method.*0\.32\.0"):
        compatibility.check()


def test_a_vllm_without_our_entry_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else vLLM starts without the plugin; a stale egg-info in the working directory is enough for that."""
    monkeypatch.setattr(compatibility, "vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(compatibility, "SYMBOLS", {})
    monkeypatch.setattr(compatibility.importlib.metadata, "entry_points", lambda group: [SimpleNamespace(value="x:y")])
    with pytest.raises(ConfigError, match="entry point"):
        compatibility.check()
