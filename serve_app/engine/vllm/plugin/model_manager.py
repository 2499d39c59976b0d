"""vLLM's LoRA managers, overridden: homes stay resident, and an adapter is only a place in one of them.

Stock, each adapter is loaded, copied into a slot and listed once a step for every active adapter. Here the worker
knows homes (``attach``, ``detach``); the LoRA id of a request stands for the place that its ``lora_path`` names.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

from cluster.bundle.serving_map import factors_rank, home_of
from cluster.errors import BundleError, ConfigError
from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin import compatibility
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.lora_layers import shard, update_kernels
from serve_app.engine.vllm.plugin.room import Room
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex, read_path


@dataclass(frozen=True)
class _OnBasis:
    """A cluster: ``served`` are its adapters' revisions, each with a core at its position."""

    position: int
    served: frozenset[str]


@dataclass(frozen=True)
class _Alone:
    """A home of factors: ``served`` have a place each in the bucket's stacks; ``empty`` touch no module: none."""

    bucket: int
    served: frozenset[str]
    empty: frozenset[str]


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
        self.clusters: dict[str, _OnBasis] = {}
        self.factor_homes: dict[str, _Alone] = {}
        slots = settings.slots_per_cluster
        self.core_rooms = [Room(slots) for _ in range(settings.num_clusters)]  # one a position
        self.factor_rooms = [Room(slots) for _, slots in settings.factor_slots]  # one a bucket
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

    # Homes, named by their content.

    def attach(self, home: str, weights: dict[str, ModuleWeights], served: Mapping[int, str]) -> None:
        """``served``: slot -> served revision, of the adapters that are to be answered for: what is here of them, by
        this home or another, stays as it is. Raises BundleError when the weights do not fit the model or there is no
        room; then nothing has changed."""
        rank = factors_rank(home)
        if rank is None:
            self._attach_cluster(home, weights, served)
        else:
            self._attach_factors(home, rank, weights, served)

    def _attach_cluster(self, home: str, weights: dict[str, ModuleWeights], served: Mapping[int, str]) -> None:
        self._check_cluster(home, weights)
        position, before = self._position_for(home, weights), self.clusters.get(home)
        kept = before.served if before else frozenset()
        room, missing = self.core_rooms[position], _without(served, kept)
        if (lacking := room.lacks(missing.values())) > room.num_free:
            raise BundleError(
                f"home {home_of(home)!r}: {lacking} cores more, the engine was started with room for "
                f"{self.settings.slots_per_cluster} a cluster and {room.num_free} are free; raise placement.headroom "
                "and start the replica anew"
            )
        is_new = not any(position == own.position for own in self.clusters.values())
        places, new = room.take(missing.values())
        self.clusters[home] = _OnBasis(position, kept | frozenset(missing.values()))
        written = {slot: places[name] for slot, name in missing.items() if name in new}
        try:
            for name, stack in self.stacks.items():
                slices = self._own_slices(name, weights)
                if is_new:
                    stack.put_basis(position, slices)
                stack.put_cores(position, written, slices)
        except BaseException:
            self._give_back_cores(position, missing.values())
            self.clusters.pop(home)
            if before is not None:
                self.clusters[home] = before
            elif is_new:
                for stack in self.stacks.values():
                    stack.clear([position])
            raise

    def _position_for(self, home: str, weights: dict[str, ModuleWeights]) -> int:
        """Of another home of the same cluster, whose basis it must have; else a free one."""
        taken = {home_of(other): own.position for other, own in self.clusters.items()}
        if (position := taken.get(home_of(home))) is not None:
            if not all(stack.has_basis(position, self._own_slices(n, weights)) for n, stack in self.stacks.items()):
                raise BundleError(
                    f"home {home_of(home)!r} has another basis than the one that is being served by this name; a new "
                    "bundle is a new deployment"
                )
            return position
        free = sorted(set(range(self.settings.num_clusters)) - set(taken.values()))
        if not free:
            raise BundleError(
                f"home {home_of(home)!r}: all {len(taken)} places of the engine are taken, by {', '.join(taken)}; "
                "start the replica anew with more homes"
            )
        return free[0]

    def _attach_factors(
        self, home: str, rank: int, weights: dict[str, ModuleWeights], served: Mapping[int, str]
    ) -> None:
        self._check_shapes(home, weights)
        largest, before = max([rank, *(own.U.shape[2] for own in weights.values())]), self.factor_homes.get(home)
        # An adapter that touches no module has no place: it answers as the base.
        touching = {slot: served[slot] for slot in _touching_slots(weights) if slot in served}
        missing = _without(touching, before.served if before else ())
        fitting = [bucket for bucket, (width, _) in enumerate(self.settings.factor_slots) if width >= largest]
        rooms = {b: self.factor_rooms[b] for b in fitting if before is None or b == before.bucket}
        bucket = next((b for b, room in rooms.items() if room.lacks(missing.values()) <= room.num_free), None)
        if bucket is None:
            free = max((room.num_free for room in rooms.values()), default=0)
            lacking = min((room.lacks(missing.values()) for room in rooms.values()), default=len(missing))
            raise BundleError(
                f"home {home_of(home)!r}: {lacking} adapters of rank {largest} more, the engine has room for {free} of "
                "that rank; raise placement.headroom and start the replica anew"
            )
        places, new = rooms[bucket].take(missing.values())
        kept = before.served if before else frozenset()
        empty = frozenset(served.values()) - frozenset(touching.values())
        self.factor_homes[home] = _Alone(bucket, kept | frozenset(missing.values()), empty)
        written = {slot: places[name] for slot, name in missing.items() if name in new}
        try:
            for name, stacks in self.factor_stacks.items():
                stacks[bucket].put_factors(written, self._own_slices(name, weights))
        except BaseException:
            # Out of memory, say: the layers that were written before hold nothing of it either.
            self._give_back_factors(bucket, missing.values())
            self.factor_homes.pop(home)
            if before is not None:
                self.factor_homes[home] = before
            raise

    def _own_slices(self, name: str, weights: dict[str, ModuleWeights]) -> list[ModuleWeights | None]:
        """This worker's part of what a layer's slices get."""
        layer = self.modules[name]
        return [shard(layer, i, weights.get(module)) for i, module in enumerate(self.slice_names(name))]

    def detach(self, home: str) -> None:
        if (own := self.clusters.pop(home, None)) is not None:
            self._give_back_cores(own.position, own.served)
            if not any(own.position == other.position for other in self.clusters.values()):
                for stack in self.stacks.values():
                    stack.clear([own.position])
        if (taken := self.factor_homes.pop(home, None)) is not None:
            self._give_back_factors(taken.bucket, taken.served)

    def _give_back_cores(self, position: int, served: Iterable[str]) -> None:
        freed = self.core_rooms[position].give_back(served)
        for stack in self.stacks.values():
            stack.clear_cores(position, freed)

    def _give_back_factors(self, bucket: int, served: Iterable[str]) -> None:
        freed = self.factor_rooms[bucket].give_back(served)
        for stacks in self.factor_stacks.values():
            stacks[bucket].clear(freed)

    def place_of(self, path: str) -> Place:
        """The engine admits no request whose home is not attached, and drains a home before it detaches it."""
        home, served = read_path(path)
        if factors_rank(home) is None:
            position = next(own.position for content, own in self.clusters.items() if home_of(content) == home)
            place = self.core_rooms[position].place_of(served)
            assert place is not None, f"{path} is not attached"
            return Place(position, place)
        for bucket, room in enumerate(self.factor_rooms):
            if (place := room.place_of(served)) is not None:
                return Place(place, bucket=bucket)
        assert any(served in own.empty for own in self.factor_homes.values()), f"{path} is not attached"
        return Place(-1, bucket=0)  # no position: an adapter that touches no module answers as the base

    def slice_names(self, name: str) -> Sequence[str]:
        """The modules of the base that the layer ``name`` packs, in order; itself where it packs none."""
        packed: Sequence[str] = self.packed_modules.get(name, [name])
        return packed

    def _check_cluster(self, home: str, weights: dict[str, ModuleWeights]) -> None:
        self._check_shapes(home, weights)
        for module, own in weights.items():
            rank = max(own.U.shape[1], own.V.shape[1])
            is_diagonal = own.cores is not None and own.cores.dim() == 2
            if rank > self.settings.rank or is_diagonal != self.settings.is_diagonal:
                raise BundleError(
                    f"home {home_of(home)!r}: module {module!r} has rank {rank} and "
                    f"{'diagonal' if is_diagonal else 'full'} cores, the engine was started with room for rank "
                    f"{self.settings.rank} and {'diagonal' if self.settings.is_diagonal else 'full'} cores; start the "
                    "replica anew"
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
                    f"home {home_of(home)!r} changes module {module!r}, which is no adapted linear layer of the base "
                    "model loaded here; serve the bundle on the base it was made for, or start the replica anew where "
                    "the home is a new one"
                )
            own.check(home_of(home), module, d_ins[module], d_outs[module])


def _touching_slots(stack: dict[str, ModuleWeights]) -> list[int]:
    """The slots of a home of factors that are not on the zero row at every module, in order."""
    slots: set[int] = set()
    for own in stack.values():
        assert own.rows is not None
        slots.update((own.rows != len(own.U) - 1).nonzero()[:, 0].tolist())
    return sorted(slots)


def _without(served: Mapping[int, str], there: Collection[str]) -> dict[int, str]:
    return {slot: name for slot, name in served.items() if name not in there}
