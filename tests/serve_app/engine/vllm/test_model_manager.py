"""The plugin's manager without an engine: what it tells vLLM's kernels, and where homes of factors stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

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
