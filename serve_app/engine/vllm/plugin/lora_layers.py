"""vLLM's own LoRA layers and kernels, by their own rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers import LoRAMapping

from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin.token_index import Positions


def update_kernels(kernels: Any, positions: Positions, num_positions: int) -> None:
    """Point vLLM's shrink and expand at positions[t] for each token, at none for -1."""
    meta = getattr(kernels, "token_mapping_meta", None)
    if meta is not None:
        # All that the GPU's kernels read. (vLLM's update_metadata lists every position in each step.)
        meta.prepare_tensors(torch.from_numpy(positions).to(kernels.device))
        # vLLM launches nothing for a batch in which nobody has a LoRA. Here that is a batch without a token of this
        # kind, and a graph that is captured on one would lack the kernels for good. They return at once without.
        meta.no_lora_flag_cpu.fill_(False)
        return
    ids = tuple((positions + 1).tolist())
    mapping = LoRAMapping(ids, ids, is_prefill=True)
    # vLLM's own convention: one more than the slots that hold something.
    kernels.update_metadata(mapping, [*range(1, num_positions + 1), None], num_positions + 2, 0)


def shard(layer: Any, slice_index: int, weights: ModuleWeights | None) -> ModuleWeights | None:
    """This rank's part, cut by the layer's own rules: V over the input's features in a row-parallel layer, U over
    the output's in a column-parallel one. (Ranks add up U S V^T x over V's parts; cores are whole everywhere.)"""
    if weights is None or layer.tp_size == 1:
        return weights
    if weights.rows is None:
        A, B = _slice(layer, slice_index, weights.V.T, weights.U)
        return ModuleWeights(U=B, V=A.T, cores=weights.cores)
    # A stack is cut as one adapter of all its ranks.
    m, q = len(weights.U), weights.U.shape[2]
    A, B = _slice(layer, slice_index, weights.V.mT.flatten(0, 1), weights.U.movedim(0, 1).flatten(1))
    U, V = B.view(len(B), m, q).movedim(1, 0), A.view(m, q, -1).mT
    return ModuleWeights(U, V, cores=None, rows=weights.rows)


def _slice(layer: Any, slice_index: int, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r) as the layer cuts those of an adapter."""
    if layer.n_slices == 1:
        return layer.slice_lora_a(A), layer.slice_lora_b(B)
    packed_A: list[Tensor | None] = [None] * layer.n_slices
    packed_B: list[Tensor | None] = [None] * layer.n_slices
    packed_A[slice_index], packed_B[slice_index] = A, B
    return layer.slice_lora_a(packed_A)[slice_index], layer.slice_lora_b(packed_B)[slice_index]
