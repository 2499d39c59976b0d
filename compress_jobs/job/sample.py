"""The samples that pass 1 left behind, read back for who clusters and for who weighs sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cluster.adapters.factors import Factors
from cluster.bundle.manifest import tenant_of
from cluster.compression.sample import Sample
from cluster.compression.stack import FactorStack, stack_factors
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import read_tensors

KindEnergies = Mapping[str, NDArray[np.float64]]
"""Kind of module -> the adapters' energies in all modules of that kind (N,)."""


def read_sample(context: JobContext, adapter_ids: Sequence[str], energies: KindEnergies) -> Sample:
    return Sample.of(read_stacks(context, adapter_ids), len(adapter_ids), energies)


def of_adapters(energies: KindEnergies, adapters: Sequence[int]) -> KindEnergies:
    return {kind: values[list(adapters)] for kind, values in energies.items()}


def read_stacks(context: JobContext, adapter_ids: Sequence[str]) -> dict[str, FactorStack]:
    """Module -> the adapters that touch it, by their numbers in ``adapter_ids``, in the order in which a ``Sample`` has
    them."""
    by_module: dict[str, list[tuple[int, Factors]]] = {}
    for member, adapter_id in enumerate(adapter_ids):
        for module, factors in _by_module(read_tensors(context, context.sample_key(adapter_id))).items():
            by_module.setdefault(module, []).append((member, factors))
    # One by one: the sample is the largest thing this task holds, and it need not be there twice.
    stacks = {module: stack_factors(by_module.pop(module)) for module in sorted(by_module)}
    return {module: stack for module, stack in stacks.items() if stack is not None}


def _by_module(tensors: dict[str, Tensor]) -> dict[str, Factors]:
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    return {module: (tensors[f"{module}.A"].float(), tensors[f"{module}.B"].float()) for module in modules}


def tenants(context: JobContext, adapter_ids: Sequence[str]) -> list[str]:
    return [tenant_of(adapter_id) if context.options.isolate else "" for adapter_id in adapter_ids]
