"""What vLLM's model runner calls each step: which adapters are in the batch, and homes that come and go."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from serve_app.engine.vllm.plugin.home_file import read_home
from serve_app.engine.vllm.plugin.model_manager import HomeModelManager
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Place

StockWorkerManager = LRUCacheWorkerLoRAManager


def make_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> LRUCacheWorkerLoRAManager:
    """Stands where the model runner looks for its manager's class."""
    ours = PluginSettings.of(vllm_config.additional_config) is not None
    return (HomeWorkerManager if ours else StockWorkerManager)(vllm_config, *args, **kwargs)


class HomeWorkerManager(LRUCacheWorkerLoRAManager):
    """What the model runner calls. Each step costs a look at the adapters of the batch, and nothing for others."""

    _manager_cls = HomeModelManager

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._paths: dict[int, str] = {}

    def _apply_adapters(self, lora_requests: set[Any]) -> None:
        manager = self._adapter_manager
        wanted = {request.lora_int_id: request.lora_path for request in lora_requests if request}
        if wanted == self._paths:
            return
        self._paths = wanted
        # The mapping is kept by vLLM for as long as the batch's ids are the same; their places are new.
        manager._last_mapping = None
        manager.places = {
            lora_id: self._dummies[lora_id] if path == DUMMY_PATH else manager.place_of(path)
            for lora_id, path in wanted.items()
        }

    def attach(self, home: str, folder: str, served: Mapping[int, str]) -> None:
        self._adapter_manager.attach(home, read_home(Path(folder)), served)
        self._paths = {}

    def detach(self, home: str) -> None:
        self._adapter_manager.detach(home)
        self._paths = {}

    # For warm-up and graph capture vLLM adds dummies: all kinds, so that no path is captured without the others.

    @cached_property
    def _dummies(self) -> dict[int, Place]:
        settings = self._adapter_manager.settings
        places = [Place(0, bucket=bucket) for bucket in range(len(settings.factor_slots))]
        places += [Place(position) for position in range(settings.num_clusters)]
        return {lora_id: places[(lora_id - 1) % len(places)] for lora_id in range(1, self.lora_config.max_loras + 1)}

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        return True

    def add_adapter(self, lora_request: Any) -> bool:
        return True

    def remove_adapter(self, adapter_id: int) -> bool:
        return False

    def remove_all_adapters(self) -> None:
        self._paths = {}
        self._adapter_manager.remove_all_adapters()

    def list_adapters(self) -> set[int]:
        return set(self._adapter_manager.places)


DUMMY_PATH = "/not/a/real/path"
"""Of the dummy requests that vLLM's model runner makes."""
