"""An adapter that no basis holds well enough: its own factors, cut by the gate or whole, stored as one object."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cluster.adapter import Factors, hash_tensors
from cluster.factors import stack_factors
from cluster.manifest import Method, served_revision
from cluster.publish import put_object
from cluster.store import Store
from cluster.svd import smallest_rank, spectra, truncate
from compress_jobs.assemble import StandaloneAdapter, squared_difference


def stand_alone(store: Store, factors: Mapping[str, Factors], method: Method, whole: bool) -> StandaloneAdapter:
    """Store the adapter's factors as the job does: cut by SVD to the smallest rank that meets the gate (with method
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


def _rounded(pair: Factors, dtype: torch.dtype) -> Factors:
    return pair[0].to(dtype).contiguous(), pair[1].to(dtype).contiguous()
