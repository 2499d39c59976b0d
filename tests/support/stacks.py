"""Clusters in a layer's stack of the vLLM plugin, each core at its own slot."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin.basis_stack import BasisStack


def put_cluster(stack: BasisStack, position: int, slices: Sequence[ModuleWeights | None]) -> None:
    stack.put_basis(position, slices)
    num_slots = max((own.num_slots for own in slices if own is not None), default=0)
    stack.put_cores(position, {slot: slot for slot in range(num_slots)}, slices)
