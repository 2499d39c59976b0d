"""vLLM's LoRA managers, overridden: homes stay resident, and an adapter is only a place in one of them.

Stock, each adapter is loaded, copied into a slot and listed once a step for every active adapter. Here the worker
knows homes (``attach``, ``detach``); the LoRA id of a request stands for the place that its ``lora_path`` names.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

from cluster.errors import BundleError, ConfigError
from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.lora_layers import set_factors, shard, update_kernels
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex, read_path


class HomeModelManager(LRUCacheLoRAModelManager):
    """Wraps the layers, holds their stacks, and tells them each step whose the tokens are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_config = kwargs["vllm_config"]
        compatibility.check_settings(vllm_config, kwargs["model"])
        settings = PluginSettings.of(vllm_config.additional_config)
        assert settings is not None
        self.settings = settings
        self.stacks: dict[str, BasisStack] = {}
        self.factor_stacks: dict[str, BasisStack] = {}  # of products that are not static
        self.positions: list[str | None] = [None] * settings.num_clusters  # -> home
        self.factor_slots: list[str | None] = [None] * settings.num_factor_slots
        self._last_mapping: LoRAMapping | None = None
        self.places: dict[int, Place] = {}  # LoRA id -> place, of the batch in hand
        super().__init__(*args, **kwargs)

    @property
    def lora_slots(self) -> int:
        """vLLM's own slots: with static products one a truncated or raw adapter, and always a last one that stays zero.
        Its CPU kernels take index -1 (a token without an adapter) for the last slot; base rows must not get somebody's
        output."""
        return (self.settings.num_factor_slots if self.settings.is_static else 0) + 1

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self.kernels = self.punica_wrapper_mapping[DEFAULT_LANGUAGE_WRAPPER_KEY]
        self.index = TokenIndex(self.settings, max_num_batched_tokens, self.device)
        self.basis_kernels = None
        if self.settings.products == "static" and self.settings.num_clusters > 1:
            self.basis_kernels = get_punica_wrapper(
                max_num_batched_tokens, max_batches=self.max_num_seqs, device=self.device, lora_config=self.lora_config
            )

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        for name, layer in self.modules.items():
            if not isinstance(layer, BaseLinearLayerWithLoRA) or len(layer.output_slices) != len(
                self.slice_names(name)
            ):
                raise ConfigError(
                    f"engine vllm: layer {name} is a {type(layer).__name__}, in which compressed adapters were not "
                    "tried; set engine to transformers"
                )
            shape = layer.input_size, layer.output_slices, self.lora_config.lora_dtype, self.device
            self.stacks[name] = BasisStack(self.settings, *shape)
            if not self.settings.is_static:
                self.factor_stacks[name] = BasisStack(self.settings.of_factors(self.lora_config.max_lora_rank), *shape)
            # On the instance: any of vLLM's linear layers, of any version, keeps its own way through the model.
            stock = layer._apply_lora_to_output
            layer._apply_lora_to_output = types.MethodType(self._make_apply(name, stock), layer)

    def _make_apply(self, name: str, stock: Any) -> Any:
        settings, index, basis_kernels = self.settings, self.index, self.basis_kernels
        stack, factor_stack = self.stacks[name], self.factor_stacks.get(name)

        def apply_sorted(layer: Any, x: Tensor, out: Tensor) -> Tensor:
            flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            if index.on_bases is not None:
                stack.add_sorted(flat_out, flat_x, index.on_bases)
            if index.on_factors is not None:
                assert factor_stack is not None
                factor_stack.add_sorted(flat_out, flat_x, index.on_factors)
            return out

        def apply_static(layer: Any, x: Tensor, out: Tensor) -> Tensor:
            flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            if settings.products == "triton":
                stack.add_triton(flat_out, flat_x, index)
            elif settings.num_clusters:
                stack.add_static(flat_out, flat_x, index.core_slots[: flat_x.shape[0]], basis_kernels)
            # Constants of the engine, not of the batch: a capture may not freeze what the batch happened to hold.
            return stock(x, out) if settings.num_factor_slots else out

        return apply_static if settings.is_static else apply_sorted

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        if mapping == self._last_mapping:
            return
        positions = self.index.set(mapping.index_mapping, self.places)
        if self.settings.is_static:
            of_factors = {lora_id: place.slot + 1 for lora_id, place in self.places.items() if place.position is None}
            update_kernels(self.kernels, [of_factors.get(i, 0) for i in mapping.index_mapping], self.lora_slots)
            if self.basis_kernels is not None:
                update_kernels(self.basis_kernels, positions, self.settings.num_clusters + 1)
        self._last_mapping = mapping

    # What vLLM's own managers keep per adapter, and we do not have.

    def activate_adapter(self, lora_id: int) -> bool:
        return False

    def add_adapter(self, lora: Any) -> bool:
        raise NotImplementedError("adapters come with their homes: attach the home")

    def get_adapter(self, adapter_id: int) -> None:
        return None

    def pin_adapter(self, lora_id: int) -> bool:
        return True  # all are

    def remove_adapter(self, adapter_id: int) -> bool:
        return False

    def list_adapters(self) -> dict[int, Any]:
        return dict.fromkeys(self.places)

    def remove_all_adapters(self) -> None:
        self.places.clear()
        self._last_mapping = None

    # Homes.

    def attach(self, home: str, weights: dict[str, ModuleWeights]) -> None:
        """Raises BundleError when the weights do not fit the model or there is no room; then nothing has changed."""
        is_cluster = home.startswith("cluster:")
        places = self.positions if is_cluster else self.factor_slots
        self.check(home, weights, is_cluster)
        place = places.index(home) if home in places else next((i for i, h in enumerate(places) if h is None), None)
        if place is None:
            raise BundleError(
                f"home {home!r}: all {len(places)} places of the engine are taken, by {', '.join(map(str, places))}; "
                "detach one of them, or start the replica anew with more homes"
            )
        for name, layer in self.modules.items():
            slices = [weights.get(module) for module in self.slice_names(name)]
            if not is_cluster and self.settings.is_static:
                set_factors(layer, place, slices)
                continue
            own = [shard(layer, i, s) for i, s in enumerate(slices)]
            (self.stacks if is_cluster else self.factor_stacks)[name].put(place, own)
        places[place] = home

    def detach(self, home: str) -> None:
        if home in self.positions:
            position = self.positions.index(home)
            for stack in self.stacks.values():
                stack.clear(position)
            self.positions[position] = None
        if home in self.factor_slots:
            slot = self.factor_slots.index(home)
            for name, layer in self.modules.items():
                if self.settings.is_static:
                    layer.reset_lora(slot)
                else:
                    self.factor_stacks[name].clear(slot)
            self.factor_slots[slot] = None

    def place_of(self, path: str) -> Place:
        home, slot = read_path(path)
        # The engine admits no request whose home is not attached, and drains a home before it detaches it.
        if home.startswith("cluster:"):
            assert home in self.positions, f"home {home!r} is not attached"
            return Place(self.positions.index(home), slot)
        assert home in self.factor_slots, f"home {home!r} is not attached"
        return Place(None, self.factor_slots.index(home))

    def slice_names(self, name: str) -> Sequence[str]:
        """The modules of the base that the layer ``name`` packs, in order; itself where it packs none."""
        packed: Sequence[str] = self.packed_modules.get(name, [name])
        return packed

    def check(self, home: str, weights: dict[str, ModuleWeights], is_cluster: bool) -> None:
        d_ins, d_outs = {}, {}
        for name, layer in self.modules.items():
            modules = self.slice_names(name)
            packed = len(modules) > 1
            sizes = layer.base_layer.output_sizes if packed else [layer.base_layer.output_size]
            for module, d_out in zip(modules, sizes, strict=True):
                d_ins[module], d_outs[module] = layer.base_layer.input_size, d_out
        room = self.settings.rank if is_cluster else self.lora_config.max_lora_rank
        for module, own in weights.items():
            if module not in d_ins:
                raise BundleError(
                    f"home {home!r} changes module {module!r}, which is no adapted linear layer of the base model "
                    "loaded here; serve the bundle on the base it was made for, or start the replica anew where the "
                    "home is a new one"
                )
            own.check(home, module, d_ins[module], d_outs[module])
            rank = max(own.U.shape[1], own.V.shape[1])
            num_cores = 0 if own.cores is None else own.cores.shape[0]
            is_diagonal = own.cores is not None and own.cores.dim() == 2
            if (
                rank > room
                or num_cores > self.settings.slots_per_cluster
                or (is_cluster and is_diagonal != self.settings.is_diagonal)
            ):
                raise BundleError(
                    f"home {home!r}: module {module!r} has rank {rank} and {num_cores} "
                    f"{'diagonal' if is_diagonal else 'full'} cores, the engine was started with room for rank {room} "
                    f"and {self.settings.slots_per_cluster} {'diagonal' if self.settings.is_diagonal else 'full'} "
                    "cores a cluster; start the replica anew"
                )
