"""The plugin's manager without an engine: what it tells vLLM's kernels, and where homes of factors stand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import BundleError
from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.room import Room
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex, write_path

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(compatibility.vllm_version() is None, reason="vLLM is not here")]

CPU = torch.device("cpu")


def gpu_kernels(monkeypatch: pytest.MonkeyPatch, max_batch: int) -> Any:
    """vLLM's own wrapper for GPUs. Its metadata are plain tensors, of any device."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper import punica_gpu

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)
    config = SimpleNamespace(max_loras=max_batch, specialize_active_lora=False)
    return punica_gpu.PunicaWrapperGPU(64, max_batch, CPU, lora_config=config)


def test_a_capture_of_few_rows_holds_the_kernels_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: vLLM's shrink and expand launch nothing where no token has a LoRA, which a capture settles for good;
    of one row's only one kind, and all others would answer as the base."""
    from vllm.lora.layers import LoRAMapping

    from serve_app.engine.vllm.plugin.model_manager import HomeModelManager
    from serve_app.engine.vllm.plugin.worker_manager import HomeWorkerManager

    manager = object.__new__(HomeModelManager)
    manager.settings = PluginSettings(25, 40, 16, ((8, 50), (16, 10_000)), False, "static")
    manager.index, manager._last_mapping = TokenIndex(manager.settings, 64, CPU), None
    manager.basis_kernels, *manager.factor_kernels = [gpu_kernels(monkeypatch, 32) for _ in range(3)]
    worker = object.__new__(HomeWorkerManager)
    worker.lora_config, worker._adapter_manager = SimpleNamespace(max_loras=32), manager

    def told(places: dict[int, Place], ids: tuple[int, ...]) -> list[tuple[bool, dict[int, int]]]:
        """A kernel set each, as its kernels read it: are they launched, and for how many tokens of which positions."""
        manager.places = places
        manager.set_adapter_mapping(LoRAMapping(ids, ids, is_prefill=False))
        read = []
        for kernels in (manager.basis_kernels, *manager.factor_kernels):
            _, _, sizes, _, positions, no_lora, _ = kernels.token_mapping_meta.meta_args(len(ids), False)
            counts = dict(zip(positions.tolist(), sizes.tolist(), strict=True))
            counts.pop(-1, None)
            read.append((not no_lora.item(), counts))
        return read

    for num_rows in (1, 2, 4):
        launched = [is_launched for is_launched, _ in told(worker._dummies, tuple(range(1, num_rows + 1)))]
        assert launched == [True] * 3, f"{num_rows} rows"
    assert told({}, (0,)) == [(True, {})] * 3
    adapters = {7: Place(24, 3), 8: Place(9_999, bucket=1), 9: Place(2, bucket=1)}
    assert told(adapters, (8, 0, 7, 9, 8)) == [(True, {24: 1}), (True, {}), (True, {9_999: 2, 2: 1})]
    assert told(adapters, (7, 0)) == [(True, {24: 1}), (True, {}), (True, {})]


D_IN, D_OUT, MODULES = 6, 5, ("q", "v")


def make_manager(room: int) -> Any:
    """Of two layers, with ``room`` positions for adapters of rank 4."""
    from serve_app.engine.vllm.plugin.model_manager import HomeModelManager

    manager = object.__new__(HomeModelManager)
    manager.settings = own = PluginSettings(0, 0, 1, ((4, room),), False, "grouped")
    manager.clusters, manager.core_rooms, manager.factor_homes, manager.factor_rooms = {}, [], {}, [Room(room)]
    layer = SimpleNamespace(tp_size=1, base_layer=SimpleNamespace(input_size=D_IN, output_size=D_OUT))
    manager.packed_modules, manager.modules, manager.stacks = {}, dict.fromkeys(MODULES, layer), {}
    manager.factor_stacks = {
        name: [BasisStack(own.of_factors(0), D_IN, (D_OUT,), torch.float32, CPU, has_cores=False)] for name in MODULES
    }
    return manager


def factors(*touched: str, slots: tuple[int, ...] = (0, 1), num_slots: int = 2) -> dict[str, ModuleWeights]:
    """A home of rank 2 whose ``slots`` have adapters, of all the modules in ``touched``."""
    home, m = {}, len(slots)
    for module in touched:
        U, V = torch.randn(m + 1, D_OUT, 2), torch.randn(m + 1, 2, D_IN).mT
        U[-1] = V[-1] = 0
        rows = torch.full((num_slots,), m)
        rows[list(slots)] = torch.arange(m)
        home[module] = ModuleWeights(U, V, None, rows)
    return home


def attach(manager: Any, home: str, weights: dict[str, ModuleWeights]) -> None:
    """With served revisions of its own for each of its slots."""
    num_slots = next(iter(weights.values())).num_slots if weights else 0
    manager.attach(f"{home}@x", weights, {slot: f"{home} {slot}" for slot in range(num_slots)})


def contents(manager: Any) -> list[Tensor]:
    return [tensor for (stack,) in manager.factor_stacks.values() for tensor in (stack.V, *stack.U)]


def assert_as_fresh(manager: Any, room: int, home: str, weights: dict[str, ModuleWeights]) -> None:
    fresh = make_manager(room)
    attach(fresh, home, weights)
    assert manager.factor_homes[f"{home}@x"] == fresh.factor_homes[f"{home}@x"]
    for mine, its in zip(contents(manager), contents(fresh), strict=True):
        assert torch.equal(mine, its)


def test_a_home_inherits_nothing_of_the_one_before_on_its_positions() -> None:
    manager, second = make_manager(2), factors("v")
    attach(manager, "factors:2.0", factors("q", "v"))
    manager.detach("factors:2.0@x")
    assert not any(tensor.any() for tensor in contents(manager))
    attach(manager, "factors:2.1", second)
    assert_as_fresh(manager, 2, "factors:2.1", second)


def test_a_home_inherits_nothing_of_one_that_failed_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for a layer")

    manager, second = make_manager(2), factors("v")
    with monkeypatch.context() as patch:
        patch.setattr(manager.factor_stacks["v"][0], "put_factors", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            attach(manager, "factors:2.0", factors("q", "v"))
    assert not any(tensor.any() for tensor in contents(manager)), "layer q was written before"
    attach(manager, "factors:2.1", second)
    assert_as_fresh(manager, 2, "factors:2.1", second)
    # Whatever free positions hold, a home that is put there holds its own alone.
    manager.detach("factors:2.1@x")
    for tensor in contents(manager):
        tensor[:2] = 7
    attach(manager, "factors:2.1", second)
    assert_as_fresh(manager, 2, "factors:2.1", second)


def test_slots_that_touch_no_module_take_no_position() -> None:
    manager = make_manager(2)
    with pytest.raises(BundleError, match="3 adapters of rank 2 more, the engine has room for 2"):
        attach(manager, "factors:2.0", factors("q", slots=(0, 2, 5), num_slots=6))
    assert manager.factor_rooms[0].num_free == 2
    home = factors("q", slots=(1,), num_slots=5) | factors("v", slots=(1, 3), num_slots=5)
    attach(manager, "factors:2.0", home)
    at_1, at_3 = (manager.place_of(write_path("factors:2.0", f"factors:2.0 {slot}")) for slot in (1, 3))
    assert {at_1.position, at_3.position} == {0, 1}
    assert at_1.bucket == at_3.bucket == 0
    (q,), (v,) = manager.factor_stacks["q"], manager.factor_stacks["v"]
    assert torch.equal(v.U[0][at_3.position, 0, :, :2], home["v"].U[1])
    assert torch.equal(q.V[at_1.position, 0, :2], home["q"].V[0].T)
    assert not q.V[at_3.position].any()
    # An adapter that touches nothing: in no group, like the base.
    index = TokenIndex(manager.settings, 4, CPU)
    _, positions = index.set([1, 2], {1: manager.place_of(write_path("factors:2.0", "factors:2.0 0")), 2: at_3})
    assert positions.tolist() == [-1, at_3.position]
    manager.detach("factors:2.0@x")
    attach(manager, "factors:2.1", factors())
    assert manager.factor_homes["factors:2.1@x"].served == set()
    assert manager.factor_rooms[0].num_free == 2


def make_clusters(slots: int) -> Any:
    """Of two layers, with positions for two clusters of ``slots`` cores."""
    manager = make_manager(1)
    manager.settings = own = PluginSettings(2, slots, 2, (), False, "grouped")
    manager.core_rooms = [Room(slots), Room(slots)]
    manager.stacks = {name: BasisStack(own, D_IN, (D_OUT,), torch.float32, CPU) for name in MODULES}
    manager.factor_stacks = {name: [] for name in MODULES}
    return manager


def bases() -> dict[str, ModuleWeights]:
    return {name: ModuleWeights(torch.randn(D_OUT, 2), torch.randn(D_IN, 2), torch.zeros(0, 2, 2)) for name in MODULES}


def on(basis: dict[str, ModuleWeights], *values: float) -> dict[str, ModuleWeights]:
    """That basis with a core a slot, which is full of its value."""
    cores = torch.tensor(values)[:, None, None].expand(-1, 2, 2)
    return {name: replace(own, cores=cores) for name, own in basis.items()}


def core(manager: Any, served: str) -> float:
    place = manager.place_of(write_path("cluster:0", served))
    cores = {float(stack.cores[manager.settings.slots_per_cluster * place.position + place.slot, 0, 1, 1]) for stack in
             manager.stacks.values()}  # fmt: skip
    (value,) = cores
    return value


def test_two_revisions_of_a_cluster_share_its_basis_and_the_cores_that_are_the_same() -> None:
    manager, basis = make_clusters(4), bases()
    manager.attach("cluster:0@a", on(basis, 1, 2, 3), {0: "one", 1: "two", 2: "three"})
    # Slots have moved, as when an adapter was removed before them; one adapter has changed.
    manager.attach("cluster:0@b", on(basis, 3, 20), {0: "three", 1: "two again"})
    assert [core(manager, name) for name in ("one", "two", "three", "two again")] == [1, 2, 3, 20]
    assert manager.core_rooms[0].num_free == 0
    manager.detach("cluster:0@a")
    assert [core(manager, name) for name in ("three", "two again")] == [3, 20]
    with pytest.raises(AssertionError, match="is not attached"):
        core(manager, "one")
    assert manager.core_rooms[0].num_free == 2
    manager.detach("cluster:0@b")
    for stack in manager.stacks.values():
        assert not any(tensor.any() for tensor in (stack.V, *stack.U, stack.cores))


def test_a_revision_without_room_or_on_another_basis_is_refused_and_nothing_has_changed() -> None:
    manager, basis = make_clusters(3), bases()
    manager.attach("cluster:0@a", on(basis, 1, 2), {0: "one", 1: "two"})
    manager.attach("cluster:1@a", on(bases(), 5), {0: "five"})
    before = [tensor.clone() for stack in manager.stacks.values() for tensor in (stack.V, *stack.U, stack.cores)]
    with pytest.raises(BundleError, match=r"home 'cluster:0': 2 cores more, .* room for 3 a cluster and 1 are free"):
        manager.attach("cluster:0@b", on(basis, 10, 20), {0: "ten", 1: "twenty"})
    with pytest.raises(BundleError, match="home 'cluster:0' has another basis"):
        manager.attach("cluster:0@b", on(bases(), 1, 2), {0: "one", 1: "two"})
    with pytest.raises(BundleError, match=r"all 2 places of the engine are taken, by cluster:0, cluster:1"):
        manager.attach("cluster:2@a", on(bases(), 1), {0: "one"})
    after = [tensor for stack in manager.stacks.values() for tensor in (stack.V, *stack.U, stack.cores)]
    assert all(map(torch.equal, before, after))
    assert manager.clusters.keys() == {"cluster:0@a", "cluster:1@a"}


def test_factors_go_where_there_is_room_of_their_rank_or_of_a_larger_one() -> None:
    manager = make_manager(2)
    attach(manager, "factors:2.0", factors("q", "v"))
    with pytest.raises(BundleError, match="the engine has room for 0 of that rank"):
        attach(manager, "factors:2.1", factors("q", slots=(0,), num_slots=1))
    own = manager.settings = replace(manager.settings, factor_slots=((4, 2), (8, 1)))
    manager.factor_rooms.append(Room(1))
    for stacks in manager.factor_stacks.values():
        stacks.append(BasisStack(own.of_factors(1), D_IN, (D_OUT,), torch.float32, CPU, has_cores=False))
    attach(manager, "factors:2.1", factors("q", slots=(0,), num_slots=1))
    assert manager.place_of(write_path("factors:2.1", "factors:2.1 0")).bucket == 1


def test_a_home_that_is_handed_over_again_gets_what_it_lacked_and_keeps_what_it_has() -> None:
    """As when an object was put back: requests run on the others meanwhile, and there may be no room left."""
    manager, home = make_manager(3), factors("q", "v", slots=(0, 1, 2), num_slots=3)
    manager.attach("factors:2.0@x", home, {0: "zero", 1: "one"})
    before = {name: manager.place_of(write_path("factors:2.0", name)) for name in ("zero", "one")}
    manager.attach("factors:2.1@x", factors("q", slots=(0,), num_slots=1), {0: "other"})
    with pytest.raises(BundleError, match="1 adapters of rank 2 more, the engine has room for 0"):
        manager.attach("factors:2.0@x", home, {0: "zero", 1: "one", 2: "two"})
    assert before == {name: manager.place_of(write_path("factors:2.0", name)) for name in before}
    manager.detach("factors:2.1@x")
    manager.attach("factors:2.0@x", home, {0: "zero", 1: "one", 2: "two"})
    assert before == {name: manager.place_of(write_path("factors:2.0", name)) for name in before}
    (q,), two = manager.factor_stacks["q"], manager.place_of(write_path("factors:2.0", "two"))
    assert torch.equal(q.U[0][two.position, 0, :, :2], home["q"].U[2])
    manager.detach("factors:2.0@x")
    assert not any(tensor.any() for tensor in contents(manager))
    assert manager.factor_rooms[0].num_free == 3
