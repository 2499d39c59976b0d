"""Pass 1, one adapter: read it whole, refuse or accept it, measure it, keep a sample of it for clustering."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from safetensors.torch import save as save_tensors

from cluster.adapter import AdapterFiles, AdapterRecord, Factors, read_adapter
from cluster.clustering import sample_modules
from cluster.errors import AdapterRefused, StoreForbidden, StoreMissing
from cluster.factors import stack_factors
from cluster.manifest import Refused
from cluster.svd import spectra
from compress_jobs.context import JobContext
from compress_jobs.parts import once


@dataclass(frozen=True)
class Inspected:
    """``record`` or ``refused``, never both. ``spectra``: module -> squared singular values, descending."""

    adapter_id: str
    record: AdapterRecord | None = None
    refused: Refused | None = None
    spectra: dict[str, list[float]] = field(default_factory=dict)


def inspect_adapter(context: JobContext, files: AdapterFiles) -> Inspected:
    """Raises StoreUnreachable only: whatever is wrong with one adapter is that adapter's own."""
    # By hash: an id that will be refused may be no key of a store.
    name = hashlib.sha256(files.adapter_id.encode()).hexdigest()[:32]
    return once(context, f"inspected/{name}", Inspected, lambda: _inspect(context, files))


def adapter_spectra(factors: dict[str, Factors]) -> dict[str, list[float]]:
    """Module -> squared singular values of B A, descending; modules of zero norm are left out."""
    stacks = {module: stack_factors([(0, pair)]) for module, pair in factors.items()}
    return {module: spectra(stack)[0].tolist() for module, stack in stacks.items() if stack is not None}


def _inspect(context: JobContext, files: AdapterFiles) -> Inspected:
    try:
        record, factors = read_adapter(context.adapters(), files, context.base)
    except AdapterRefused as refused:
        return Inspected(files.adapter_id, refused=Refused(refused.reason, refused.message))
    except (StoreForbidden, StoreMissing) as error:
        return Inspected(files.adapter_id, refused=Refused("unreadable", str(error)))
    if context.options.needs_sample and not context.options.is_raw(files.adapter_id):
        context.out().write(context.sample_key(files.adapter_id), _pack_sample(context, factors))
    return Inspected(files.adapter_id, record, spectra=adapter_spectra(factors))


def _pack_sample(context: JobContext, factors: dict[str, Factors]) -> bytes:
    touched = {module for module, (_, B) in factors.items() if B.any()}
    sampled = touched.intersection(context.sampled) or set(
        sample_modules([module for module in factors if module in touched])
    )
    tensors = {}
    for module in sampled:
        A, B = factors[module]
        # bfloat16 is enough to tell which adapters belong together.
        tensors[f"{module}.A"], tensors[f"{module}.B"] = A.to(torch.bfloat16), B.to(torch.bfloat16)
    packed: bytes = save_tensors(tensors)
    return packed
