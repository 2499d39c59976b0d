"""Mixed into vLLM's own workers for the benchmark: how many bytes their LoRA slots and their cache hold."""

from __future__ import annotations

from typing import Any


class StockWorker:
    model_runner: Any

    def resident_bytes(self) -> int:
        manager = self.model_runner.lora_manager._adapter_manager
        tensors = []
        for layer in manager.modules.values():
            tensors += [*layer.lora_a_stacked, *layer.lora_b_stacked]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
