"""What the engine asks of vLLM's workers, by ``collective_rpc``: vLLM mixes this class into its worker."""

from __future__ import annotations

import itertools
from typing import Any

from cluster.errors import BundleError


class HomeWorker:
    """An expected failure is returned as text, not raised: it is the home's, and the worker goes on."""

    model_runner: Any

    def attach_home(self, home: str, folder: str, served: dict[int, str]) -> str | None:
        """``served``: slot -> served revision, of the adapters that are to be answered for."""
        try:
            self.model_runner.lora_manager.attach(home, folder, served)
        except BundleError as error:
            return str(error)
        return None

    def detach_home(self, home: str) -> None:
        self.model_runner.lora_manager.detach(home)

    def ping(self) -> None:
        """Answered between two steps."""

    def resident_bytes(self) -> int:
        """Bytes of all stacks of this worker, and of vLLM's one LoRA slot."""
        manager = self.model_runner.lora_manager._adapter_manager
        tensors = []
        for stack in itertools.chain(manager.stacks.values(), *manager.factor_stacks.values()):
            tensors += [stack.V, *stack.U, stack.cores]
        for layer in manager.modules.values():
            tensors += [*layer.lora_a_stacked, *layer.lora_b_stacked]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
