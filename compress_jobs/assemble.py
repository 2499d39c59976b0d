"""From parts to objects: a cluster's basis and cores, or the factors of an adapter that stands alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.adapter import AdapterRecord, Factors, factored_energy, hash_tensors, read_modules
from cluster.bundle import object_key
from cluster.errors import AdapterChanged, StoreMissing
from cluster.factors import stack_factors
from cluster.manifest import served_revision
from cluster.publish import StoredObject, put_object
from cluster.svd import smallest_rank, spectra, truncate
from compress_jobs.context import JobContext
from compress_jobs.parts import once, read_tensors


@dataclass(frozen=True)
class AssembledCluster:
    """``served`` are the served revisions of the members kept, in the order of their slots."""

    basis: StoredObject
    cores: StoredObject
    served: tuple[str, ...]


@dataclass(frozen=True)
class StandaloneAdapter:
    """A truncated or raw adapter. ``squared_errors``: module -> ||M - M^||^2 of the stored factors."""

    mode: str
    rank: int
    factors: StoredObject
    served: str
    squared_errors: dict[str, float]


@dataclass(frozen=True)
class Changed:
    """The adapter's file is no longer the one that was inspected."""

    message: str


def assemble_cluster(context: JobContext, cluster: int, num_layers: int, kept: Sequence[int]) -> AssembledCluster:
    """Join a cluster's parts into its two objects. ``kept`` are the positions, among the cluster's members, of
    the adapters that are served from it; they become slots 0, 1, ..."""
    digest = hashlib.sha256(repr(list(kept)).encode()).hexdigest()[:16]
    name = f"{context.fits}assembled/{cluster}-{digest}"

    def step() -> AssembledCluster:
        return _assemble_cluster(context, cluster, num_layers, kept)

    return once(context, name, AssembledCluster, step, lambda done: _are_stored(context, done.basis, done.cores))


def _assemble_cluster(context: JobContext, cluster: int, num_layers: int, kept: Sequence[int]) -> AssembledCluster:
    store = context.out()
    basis: dict[str, torch.Tensor] = {}
    cores: dict[str, torch.Tensor] = {}
    for layer in range(num_layers):
        for name, tensor in read_tensors(context, context.fit_key(layer, cluster)).items():
            if name.endswith((".U", ".V")):
                basis[name] = tensor
            else:
                cores[name] = tensor[list(kept)]
    stored_basis, stored_cores = put_object(store, basis), put_object(store, cores)
    served = tuple(
        served_revision("core", stored_basis.sha, hash_tensors({name: core[slot] for name, core in cores.items()}))
        for slot in range(len(kept))
    )
    return AssembledCluster(stored_basis, stored_cores, served)


def write_standalone(context: JobContext, record: AdapterRecord) -> StandaloneAdapter | Changed:
    """Store an adapter's own factors: whole if it is opted out by ``--raw``, else cut by SVD to the smallest
    rank that meets the gate (with ``--method svd``: to the given rank, if that meets it)."""
    name = f"alone/{context.options.method}-{context.options.rank}/{record.adapter_id}"

    def stands(done: StandaloneAdapter | Changed) -> bool:
        return isinstance(done, StandaloneAdapter) and _are_stored(context, done.factors)

    return once(context, name, StandaloneAdapter | Changed, lambda: _write_standalone(context, record), stands)


def _are_stored(context: JobContext, *objects: StoredObject) -> bool:
    store = context.out()
    try:
        return all(
            "sha256:" + hashlib.sha256(store.read(object_key(item.sha)).data).hexdigest() == item.sha
            for item in objects
        )
    except StoreMissing:
        return False


def _write_standalone(context: JobContext, record: AdapterRecord) -> StandaloneAdapter | Changed:
    try:
        factors = read_modules(context.adapters(), record, list(record.modules))
    except AdapterChanged as changed:
        return Changed(changed.message)
    factors = {module: pair for module, pair in factors.items() if record.modules[module].energy > 0}
    largest = max(A.shape[0] for A, _ in factors.values())
    rank = largest if context.options.is_raw(record.adapter_id) else _rank_by_gate(context, factors)
    mode = "truncated" if rank < largest else "raw"
    if mode == "truncated":
        stored = {module: _rounded(truncate(A, B, rank), context.dtype) for module, (A, B) in factors.items()}
    else:
        # Whole means whole: where the bundle's dtype would round (a folded scale, float32 sources), keep float32.
        exact = all(torch.equal(t, t.to(context.dtype).float()) for pair in factors.values() for t in pair)
        stored = {module: _rounded(pair, context.dtype if exact else torch.float32) for module, pair in factors.items()}
    tensors = {f"{module}.{name}": t for module, pair in stored.items() for name, t in zip("AB", pair, strict=True)}
    return StandaloneAdapter(
        mode=mode,
        rank=rank,
        factors=put_object(context.out(), tensors),
        served=served_revision(mode, hash_tensors(tensors)),
        squared_errors={module: squared_difference(factors[module], stored[module]) for module in factors},
    )


def squared_difference(ours: Factors, theirs: Factors) -> float:
    """||B A - B' A'||_F^2 in factored form and float64, clamped at 0."""
    A = torch.cat([ours[0].double(), theirs[0].double()])
    B = torch.cat([ours[1].double(), -theirs[1].double()], dim=1)
    return max(factored_energy(A, B), 0.0)


def _rank_by_gate(context: JobContext, factors: dict[str, Factors]) -> int:
    stacks = [stack_factors([(0, pair)]) for pair in factors.values()]
    needed, _ = smallest_rank([spectra(stack)[0] for stack in stacks if stack is not None], context.options.gate)
    return max(needed, int(context.options.rank)) if context.options.method == "svd" else needed


def _rounded(pair: Factors, dtype: torch.dtype) -> Factors:
    return pair[0].to(dtype).contiguous(), pair[1].to(dtype).contiguous()
