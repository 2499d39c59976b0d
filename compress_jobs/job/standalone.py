"""An adapter that no basis holds well enough: its own factors, cut by the gate or whole, stored as one object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cluster.adapters.factors import Factors, factored_energy
from cluster.bundle.manifest import Method, served_revision
from cluster.bundle.publish import StoredObject, put_object
from cluster.compression.stack import stack_factors
from cluster.compression.svd import smallest_rank, spectra, truncate
from cluster.hashing import hash_tensors
from cluster.store.protocol import Store


@dataclass(frozen=True)
class StandaloneAdapter:
    """A truncated or raw adapter. ``squared_errors``: module -> ||M - M^||^2 of the stored factors."""

    mode: str
    rank: int
    factors: StoredObject
    served: str
    squared_errors: dict[str, float]


def stand_alone(store: Store, factors: Mapping[str, Factors], method: Method, whole: bool) -> StandaloneAdapter:
    """Store the adapter's factors: cut by SVD to the smallest rank that meets the gate (with method
    svd to its rank, if that meets it), or ``whole``. Modules in which it is zero are left out."""
    dtype: torch.dtype = getattr(torch, method.dtype)
    stacks = {module: stack for module, pair in factors.items() if (stack := stack_factors([(0, pair)])) is not None}
    largest = max(stack.ranks[0] for stack in stacks.values())
    rank = largest
    if not whole:
        rank, _ = smallest_rank([spectra(stack)[0] for stack in stacks.values()], method.gate)
        rank = max(rank, method.rank) if method.name == "svd" else rank
    mode = "truncated" if rank < largest else "raw"
    if mode == "truncated":
        stored = {module: _rounded(truncate(*factors[module], rank), dtype) for module in stacks}
    else:
        # Whole means whole: where the bundle's dtype would round (a folded scale, float32 sources), keep float32.
        exact = all(torch.equal(t, t.to(dtype).float()) for module in stacks for t in factors[module])
        stored = {module: _rounded(factors[module], dtype if exact else torch.float32) for module in stacks}
    tensors = {f"{module}.{name}": t for module, pair in stored.items() for name, t in zip("AB", pair, strict=True)}
    return StandaloneAdapter(
        mode=mode,
        rank=min(rank, largest),
        factors=put_object(store, tensors),
        served=served_revision(mode, hash_tensors(tensors)),
        squared_errors={module: squared_difference(factors[module], stored[module]) for module in stacks},
    )


def squared_difference(ours: Factors, theirs: Factors) -> float:
    """||B A - B' A'||_F^2 in factored form and float64, clamped at 0."""
    A = torch.cat([ours[0].double(), theirs[0].double()])
    B = torch.cat([ours[1].double(), -theirs[1].double()], dim=1)
    return max(factored_energy(A, B), 0.0)


def _rounded(pair: Factors, dtype: torch.dtype) -> Factors:
    return pair[0].to(dtype).contiguous(), pair[1].to(dtype).contiguous()
