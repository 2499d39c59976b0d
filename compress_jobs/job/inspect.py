"""Pass 1, one adapter: read it whole, refuse or accept it, measure it, keep a sample of it for clustering."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from cluster.adapters.factors import Factors
from cluster.adapters.reading import read_adapter
from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.bundle.manifest import Refused
from cluster.compression.sample import sample_modules
from cluster.compression.stack import stack_factors
from cluster.compression.svd import spectra
from cluster.errors import AdapterRefused, StoreForbidden, StoreMissing
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once, tensors_stand, write_tensors

# Of the store's making, not the adapter's: tried again by a job that goes on.
_UNREADABLE = "unreadable"


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

    def stands(found: Inspected) -> bool:
        if found.refused is not None:
            return found.refused.reason != _UNREADABLE
        return not _has_sample(context, found.adapter_id) or tensors_stand(
            context, [context.sample_key(found.adapter_id)]
        )

    return once(context, f"inspected/{name}", Inspected, lambda: _inspect(context, files), stands)


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
        return Inspected(files.adapter_id, refused=Refused(_UNREADABLE, str(error)))
    if _has_sample(context, files.adapter_id):
        write_tensors(context, context.sample_key(files.adapter_id), _sample(context, factors))
    return Inspected(files.adapter_id, record, spectra=adapter_spectra(factors))


def _has_sample(context: JobContext, adapter_id: str) -> bool:
    return context.options.needs_sample and not context.options.is_raw(adapter_id)


def _sample(context: JobContext, factors: dict[str, Factors]) -> dict[str, torch.Tensor]:
    touched = {module for module, (_, B) in factors.items() if B.any()}
    sampled = touched.intersection(context.sampled) or set(
        sample_modules([module for module in factors if module in touched])
    )
    tensors = {}
    for module in sampled:
        A, B = factors[module]
        # bfloat16 is enough to tell which adapters belong together.
        tensors[f"{module}.A"], tensors[f"{module}.B"] = A.to(torch.bfloat16), B.to(torch.bfloat16)
    return tensors
