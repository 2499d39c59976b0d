"""Into vLLM's own LoRA layers and kernels, by their own rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.layers import LoRAMapping

from cluster.layer import ModuleWeights


def update_kernels(kernels: Any, ids: Sequence[int], num_slots: int) -> None:
    """Point vLLM's shrink and expand at slot ids[t] - 1 for each token, at none for 0."""
    mapping = LoRAMapping(tuple(ids), tuple(ids), is_prefill=True)
    # vLLM's own convention: one more than the slots that hold something.
    kernels.update_metadata(mapping, [*range(1, num_slots), None], num_slots + 1, 0)


def shard(layer: Any, slice_index: int, weights: ModuleWeights | None) -> ModuleWeights | None:
    """This rank's part, cut by the layer's own rules: V over the input's features in a row-parallel layer, U over
    the output's in a column-parallel one. (Ranks add up U S V^T x over V's parts; cores are whole everywhere.)"""
    if weights is None or layer.tp_size == 1:
        return weights
    if layer.n_slices == 1:
        A, B = layer.slice_lora_a(weights.V.T), layer.slice_lora_b(weights.U)
    else:
        packed_A: list[Tensor | None] = [None] * layer.n_slices
        packed_B: list[Tensor | None] = [None] * layer.n_slices
        packed_A[slice_index], packed_B[slice_index] = weights.V.T, weights.U
        A, B = layer.slice_lora_a(packed_A)[slice_index], layer.slice_lora_b(packed_B)[slice_index]
    return ModuleWeights(U=B, V=A.T, cores=weights.cores)


def set_factors(layer: Any, slot: int, slices: Sequence[ModuleWeights | None]) -> None:
    """Into vLLM's own slot, by its own rules (which slice them for tensor parallelism)."""
    A = [None if weights is None else weights.V.T for weights in slices]
    B = [None if weights is None else weights.U for weights in slices]
    if len(slices) > 1:
        layer.set_lora(slot, A, B)
    elif A[0] is None:
        layer.reset_lora(slot)
    else:
        layer.set_lora(slot, A[0], B[0])
