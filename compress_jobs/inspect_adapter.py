"""Pass 1, one adapter: read it whole, refuse or accept it, keep a sample of it for clustering."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cluster.adapter import AdapterFiles, AdapterRecord, Factors, read_adapter
from cluster.clustering import Assignment, Sample, assign, sample_modules
from cluster.errors import AdapterRefused, StoreForbidden, StoreMissing
from cluster.factors import stack_factors
from compress_jobs.context import JobContext


@dataclass(frozen=True)
class Inspected:
    """``record`` or ``refused``, never both."""

    adapter_id: str
    record: AdapterRecord | None
    refused: AdapterRefused | None


def inspect_adapter(context: JobContext, files: AdapterFiles) -> Inspected:
    """Raises StoreUnreachable only: whatever is wrong with one adapter is that adapter's own."""
    try:
        record, factors = read_adapter(context.adapters(), files, context.base)
    except AdapterRefused as refused:
        return Inspected(files.adapter_id, None, refused)
    except (StoreForbidden, StoreMissing) as error:
        return Inspected(files.adapter_id, None, AdapterRefused(files.adapter_id, "unreadable", str(error)))
    if context.options.needs_sample and not context.options.is_raw(files.adapter_id):
        context.out().write(context.sample_key(files.adapter_id), _pack_sample(context, factors))
    return Inspected(files.adapter_id, record, None)


def cluster_adapters(context: JobContext, adapter_ids: list[str], num_clusters: int) -> Assignment:
    """Assign the adapters to clusters by the samples that pass 1 left behind."""
    store = context.out()
    by_module: dict[str, list[tuple[int, Factors]]] = {}
    for member, adapter_id in enumerate(adapter_ids):
        for module, factors in _unpack_sample(store.read(context.sample_key(adapter_id)).data).items():
            by_module.setdefault(module, []).append((member, factors))
    # One by one: the sample is the largest thing this task holds, and it need not be there twice.
    stacks = {module: stack_factors(by_module.pop(module)) for module in sorted(by_module)}
    present = {module: stack for module, stack in stacks.items() if stack is not None}
    sample = Sample.of(present, len(adapter_ids))
    return assign(sample, num_clusters, context.options.rank, context.options.seed)


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


def _unpack_sample(data: bytes) -> dict[str, Factors]:
    tensors = load_tensors(data)
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    return {module: (tensors[f"{module}.A"].float(), tensors[f"{module}.B"].float()) for module in modules}
