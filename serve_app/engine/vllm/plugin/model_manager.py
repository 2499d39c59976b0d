"""vLLM's LoRA managers, overridden: homes stay resident, and an adapter is only a place in one of them.

Stock, each adapter is loaded, copied into a slot and listed once a step for every active adapter. Here the worker
knows homes (``attach``, ``detach``); the LoRA id of a request stands for the place that its ``lora_path`` names.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

from cluster.bundle.serving_map import factors_rank
from cluster.errors import BundleError, ConfigError
from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.lora_layers import shard, update_kernels
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex, read_path


@dataclass(frozen=True)
class _Taken:
    """A home of factors: slot s of it stands at ``positions[s]`` of the bucket's stacks. A slot without an adapter, or
    of one that touches no module, has no position."""

    bucket: int
    positions: Mapping[int, int]


class HomeModelManager(LRUCacheLoRAModelManager):
    """Wraps the layers, holds their stacks, and tells them each step whose the tokens are."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vllm_config = kwargs["vllm_config"]
        compatibility.check_settings(vllm_config, kwargs["model"])
        settings = PluginSettings.of(vllm_config.additional_config)
        assert settings is not None
        self.settings = settings
        self.stacks: dict[str, BasisStack] = {}
        self.factor_stacks: dict[str, list[BasisStack]] = {}  # one a bucket
        self.positions: list[str | None] = [None] * settings.num_clusters  # -> home
        self.factor_homes: dict[str, _Taken] = {}
        self.free_positions = [list(range(slots)) for _, slots in settings.factor_slots]  # one a bucket
        self._last_mapping: LoRAMapping | None = None
        self.places: dict[int, Place] = {}  # LoRA id -> place, of the batch in hand
        super().__init__(*args, **kwargs)

    @property
    def lora_slots(self) -> int:
        """vLLM's own slots, of which we need none: the least it can make."""
        return 1

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super()._init_punica_wrapper(max_num_batched_tokens, vllm_config)
        self.index = TokenIndex(self.settings, max_num_batched_tokens, self.device)
        self.basis_kernels = None

        def kernels() -> Any:
            return get_punica_wrapper(
                max_num_batched_tokens, max_batches=self.max_num_seqs, device=self.device, lora_config=self.lora_config
            )

        if self.settings.products == "static" and self.settings.num_clusters > 1:
            self.basis_kernels = kernels()
        self.factor_kernels = [kernels() for _ in self.settings.factor_slots] if self.settings.is_static else []

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
            self.factor_stacks[name] = [
                BasisStack(self.settings.of_factors(bucket), *shape, has_cores=False)
                for bucket in range(len(self.settings.factor_slots))
            ]
            # On the instance: any of vLLM's linear layers, of any version, keeps its own way through the model.
            layer._apply_lora_to_output = types.MethodType(self._make_apply(name), layer)

    def _make_apply(self, name: str) -> Any:
        settings, index = self.settings, self.index
        basis_kernels, factor_kernels = self.basis_kernels, self.factor_kernels
        stack, factor_stacks = self.stacks[name], self.factor_stacks[name]

        def apply_sorted(layer: Any, x: Tensor, out: Tensor) -> Tensor:
            flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            if index.on_bases is not None:
                stack.add_sorted(flat_out, flat_x, index.on_bases)
            for factor_stack, tokens in zip(factor_stacks, index.on_factors, strict=True):
                if tokens is not None:
                    factor_stack.add_sorted(flat_out, flat_x, tokens)
            return out

        def apply_static(layer: Any, x: Tensor, out: Tensor) -> Tensor:
            flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
            if settings.products == "triton":
                stack.add_triton(flat_out, flat_x, index)
            elif settings.num_clusters:
                stack.add_static(flat_out, flat_x, index.core_slots[: flat_x.shape[0]], basis_kernels)
            # All buckets, always: a capture may not freeze what the batch happened to hold.
            for factor_stack, kernels in zip(factor_stacks, factor_kernels, strict=True):
                factor_stack.add_static(flat_out, flat_x, index.core_slots[: flat_x.shape[0]], kernels)
            return out

        return apply_static if settings.is_static else apply_sorted

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        if mapping == self._last_mapping:
            return
        on_bases, *on_factors = self.index.set(mapping.index_mapping, self.places)
        if self.basis_kernels is not None:
            update_kernels(self.basis_kernels, on_bases, self.settings.num_clusters)
        if self.settings.is_static:
            for kernels, positions, (_, slots) in zip(
                self.factor_kernels, on_factors, self.settings.factor_slots, strict=True
            ):
                update_kernels(kernels, positions, slots)
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
        rank = factors_rank(home)
        if rank is None:
            self._attach_cluster(home, weights)
        else:
            self._attach_factors(home, rank, weights)

    def _attach_cluster(self, home: str, weights: dict[str, ModuleWeights]) -> None:
        self._check_cluster(home, weights)
        places = self.positions
        place = places.index(home) if home in places else next((i for i, h in enumerate(places) if h is None), None)
        if place is None:
            raise BundleError(
                f"home {home!r}: all {len(places)} places of the engine are taken, by {', '.join(map(str, places))}; "
                "detach one of them, or start the replica anew with more homes"
            )
        for name, stack in self.stacks.items():
            stack.put(place, self._own_slices(name, weights))
        places[place] = home

    def _attach_factors(self, home: str, rank: int, weights: dict[str, ModuleWeights]) -> None:
        self._check_shapes(home, weights)
        slots = _touching_slots(weights)
        largest = max((own.U.shape[2] for own in weights.values()), default=rank)
        bucket, taken = self.settings.bucket_of(rank), self.factor_homes.get(home)
        room = 0 if bucket is None else len(self.free_positions[bucket]) + len(taken.positions if taken else ())
        if bucket is None or room < len(slots) or largest > self.settings.factor_slots[bucket][0]:
            raise BundleError(
                f"home {home!r}: {len(slots)} adapters of rank {max(rank, largest)}, the engine has room for "
                f"{room} more of that rank; detach a home of it, or start the replica anew with more homes"
            )
        self.detach(home)
        positions = dict(zip(slots, self.free_positions[bucket], strict=False))
        del self.free_positions[bucket][: len(slots)]
        self.factor_homes[home] = _Taken(bucket, positions)
        try:
            for name, stacks in self.factor_stacks.items():
                stacks[bucket].put_factors(positions, self._own_slices(name, weights))
        except BaseException:
            self.detach(home)  # out of memory, say: the layers that were written before hold nothing of it either
            raise

    def _own_slices(self, name: str, weights: dict[str, ModuleWeights]) -> list[ModuleWeights | None]:
        """This worker's part of what a layer's slices get."""
        layer = self.modules[name]
        return [shard(layer, i, weights.get(module)) for i, module in enumerate(self.slice_names(name))]

    def detach(self, home: str) -> None:
        if home in self.positions:
            position = self.positions.index(home)
            for stack in self.stacks.values():
                stack.clear([position])
            self.positions[position] = None
        if (taken := self.factor_homes.pop(home, None)) is not None:
            for stacks in self.factor_stacks.values():
                stacks[taken.bucket].clear(list(taken.positions.values()))
            self.free_positions[taken.bucket] += taken.positions.values()

    def place_of(self, path: str) -> Place:
        home, slot = read_path(path)
        # The engine admits no request whose home is not attached, and drains a home before it detaches it.
        if (taken := self.factor_homes.get(home)) is not None:
            # -1 is no position: an adapter that touches no module answers as the base.
            return Place(taken.positions.get(slot, -1), bucket=taken.bucket)
        assert home in self.positions, f"home {home!r} is not attached"
        return Place(self.positions.index(home), slot)

    def slice_names(self, name: str) -> Sequence[str]:
        """The modules of the base that the layer ``name`` packs, in order; itself where it packs none."""
        packed: Sequence[str] = self.packed_modules.get(name, [name])
        return packed

    def _check_cluster(self, home: str, weights: dict[str, ModuleWeights]) -> None:
        self._check_shapes(home, weights)
        for module, own in weights.items():
            rank = max(own.U.shape[1], own.V.shape[1])
            is_diagonal = own.cores is not None and own.cores.dim() == 2
            if (
                rank > self.settings.rank
                or own.num_slots > self.settings.slots_per_cluster
                or is_diagonal != self.settings.is_diagonal
            ):
                raise BundleError(
                    f"home {home!r}: module {module!r} has rank {rank} and {own.num_slots} "
                    f"{'diagonal' if is_diagonal else 'full'} cores, the engine was started with room for rank "
                    f"{self.settings.rank} and {self.settings.slots_per_cluster} "
                    f"{'diagonal' if self.settings.is_diagonal else 'full'} cores a cluster; start the replica anew"
                )

    def _check_shapes(self, home: str, weights: dict[str, ModuleWeights]) -> None:
        d_ins, d_outs = {}, {}
        for name, layer in self.modules.items():
            modules = self.slice_names(name)
            packed = len(modules) > 1
            sizes = layer.base_layer.output_sizes if packed else [layer.base_layer.output_size]
            for module, d_out in zip(modules, sizes, strict=True):
                d_ins[module], d_outs[module] = layer.base_layer.input_size, d_out
        for module, own in weights.items():
            if module not in d_ins:
                raise BundleError(
                    f"home {home!r} changes module {module!r}, which is no adapted linear layer of the base model "
                    "loaded here; serve the bundle on the base it was made for, or start the replica anew where the "
                    "home is a new one"
                )
            own.check(home, module, d_ins[module], d_outs[module])


def _touching_slots(stack: dict[str, ModuleWeights]) -> list[int]:
    """The slots of a home of factors that are not on the zero row at every module, in order."""
    slots: set[int] = set()
    for own in stack.values():
        assert own.rows is not None
        slots.update((own.rows != len(own.U) - 1).nonzero()[:, 0].tolist())
    return sorted(slots)
