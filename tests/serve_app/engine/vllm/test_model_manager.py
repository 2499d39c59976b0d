"""The plugin's manager without an engine: what it tells vLLM's kernels, and where homes of factors stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.errors import BundleError
from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
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
    manager.positions, manager.factor_homes, manager.free_positions = [], {}, [list(range(room))]
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


def contents(manager: Any) -> list[Tensor]:
    return [tensor for (stack,) in manager.factor_stacks.values() for tensor in (stack.V, *stack.U)]


def assert_as_fresh(manager: Any, room: int, home: str, weights: dict[str, ModuleWeights]) -> None:
    fresh = make_manager(room)
    fresh.attach(home, weights)
    assert manager.factor_homes[home] == fresh.factor_homes[home]
    for mine, its in zip(contents(manager), contents(fresh), strict=True):
        assert torch.equal(mine, its)


def test_a_home_inherits_nothing_of_the_one_before_on_its_positions() -> None:
    manager, second = make_manager(2), factors("v")
    manager.attach("factors:2.0", factors("q", "v"))
    manager.detach("factors:2.0")
    assert not any(tensor.any() for tensor in contents(manager))
    manager.attach("factors:2.1", second)
    assert_as_fresh(manager, 2, "factors:2.1", second)


def test_a_home_inherits_nothing_of_one_that_failed_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for a layer")

    manager, second = make_manager(2), factors("v")
    with monkeypatch.context() as patch:
        patch.setattr(manager.factor_stacks["v"][0], "put_factors", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            manager.attach("factors:2.0", factors("q", "v"))
    assert not any(tensor.any() for tensor in contents(manager)), "layer q was written before"
    manager.attach("factors:2.1", second)
    assert_as_fresh(manager, 2, "factors:2.1", second)
    # Whatever free positions hold, a home that is put there holds its own alone.
    manager.detach("factors:2.1")
    for tensor in contents(manager):
        tensor[:2] = 7
    manager.attach("factors:2.1", second)
    assert_as_fresh(manager, 2, "factors:2.1", second)


def test_slots_that_touch_no_module_take_no_position() -> None:
    manager = make_manager(2)
    with pytest.raises(BundleError, match="3 adapters of rank 2, the engine has room for 2"):
        manager.attach("factors:2.0", factors("q", slots=(0, 2, 5), num_slots=6))
    assert manager.free_positions == [[0, 1]]
    home = factors("q", slots=(1,), num_slots=5) | factors("v", slots=(1, 3), num_slots=5)
    manager.attach("factors:2.0", home)
    at_1, at_3 = (manager.place_of(write_path("factors:2.0", slot)) for slot in (1, 3))
    assert {at_1.position, at_3.position} == {0, 1}
    assert at_1.bucket == at_3.bucket == 0
    (q,), (v,) = manager.factor_stacks["q"], manager.factor_stacks["v"]
    assert torch.equal(v.U[0][at_3.position, 0, :, :2], home["v"].U[1])
    assert torch.equal(q.V[at_1.position, 0, :2], home["q"].V[0].T)
    assert not q.V[at_3.position].any()
    # An adapter that touches nothing: in no group, like the base.
    index = TokenIndex(manager.settings, 4, CPU)
    _, positions = index.set([1, 2], {1: manager.place_of(write_path("factors:2.0", 0)), 2: at_3})
    assert positions.tolist() == [-1, at_3.position]
    manager.detach("factors:2.0")
    manager.attach("factors:2.1", factors())
    assert manager.factor_homes["factors:2.1"].positions == {}
    assert sorted(manager.free_positions[0]) == [0, 1]
