"""Pass 2, one layer: read its factors from every adapter, fit each cluster's bases, measure every adapter.

Memory is bounded by this layer's factors; nothing of another layer is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as save_tensors

from cluster.adapter import AdapterRecord, Factors, read_modules
from cluster.clustering import Labels
from cluster.errors import AdapterChanged
from cluster.factors import FactorStack, stack_factors
from cluster.jd import captured_energy, jd_full, relative_errors, unit_cores
from cluster.svd import spectra
from compress_jobs.context import JobContext, peak_memory_bytes

_READS_AT_ONCE = 8

Errors = dict[str, NDArray[np.float64]]
"""Module -> ||M - M^||^2 of every adapter (N,), 0 where the adapter does not touch the module."""


@dataclass(frozen=True)
class LayerFit:
    """What the driver learns of a layer: figures, no tensors of the collection.

    ``spectra``: module -> adapter index -> squared singular values. ``changed``: adapter index -> message.
    """

    squared_errors: Errors = field(default_factory=dict)
    random_squared_errors: Errors = field(default_factory=dict)
    spectra: dict[str, dict[int, NDArray[np.float64]]] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    num_bytes_read: int = 0
    peak_memory_bytes: int = 0


def fit_layer(
    context: JobContext,
    layer: int,
    modules: Sequence[str],
    records: Sequence[AdapterRecord],
    labels: Labels,
    random_labels: Labels,
) -> LayerFit:
    """Fit one layer and leave, for every cluster, a part with its bases and its members' cores in ``work/``.

    A part holds ``<module>.U``, ``<module>.V`` and ``<module>`` (members, r_U, r_V) in the order of the cluster's
    members, in the dtype they will be served in. An adapter whose file has changed is reported and left out.
    """
    factors, changed, num_bytes = _read(context, modules, records)
    fit = LayerFit(changed=changed, num_bytes_read=num_bytes)
    parts: dict[int, dict[str, torch.Tensor]] = {int(cluster): {} for cluster in np.unique(labels)}
    for module in modules:
        # Taken out of ``factors``: what has been stacked is not held twice.
        stack = stack_factors([(i, found.pop(module)) for i, found in enumerate(factors) if module in found])
        if stack is None:
            continue
        fit.squared_errors[module] = _fit_module(context, module, stack, labels, parts)
        if (random_labels == labels).all():
            fit.random_squared_errors[module] = fit.squared_errors[module]
        else:
            fit.random_squared_errors[module] = _measure_only(context, module, stack, random_labels)
        fit.spectra[module] = dict(zip(stack.members, spectra(stack), strict=True))
    for cluster, part in parts.items():
        context.out().write(context.fit_key(layer, cluster), save_tensors(part))
    return LayerFit(**{**vars(fit), "peak_memory_bytes": peak_memory_bytes()})


def _read(
    context: JobContext, modules: Sequence[str], records: Sequence[AdapterRecord]
) -> tuple[list[dict[str, Factors]], dict[int, str], int]:
    store = context.adapters()
    changed: dict[int, str] = {}

    def read_one(index: int) -> dict[str, Factors]:
        try:
            return read_modules(store, records[index], modules)
        except AdapterChanged as error:
            changed[index] = error.message
            return {}

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        factors = list(pool.map(read_one, range(len(records))))
    places = [record.modules[module] for record in records for module in modules if module in record.modules]
    return factors, changed, sum(place.end - place.start for pair in places for place in (pair.A, pair.B))


def _fit_module(
    context: JobContext, module: str, stack: FactorStack, labels: Labels, parts: dict[int, dict[str, torch.Tensor]]
) -> NDArray[np.float64]:
    """Add the module to every cluster's part; returns the squared errors of what will be served."""
    squared_errors = np.zeros(len(labels))
    for cluster, part in parts.items():
        own = _select(stack, labels, cluster)
        if own is None:
            continue
        basis = jd_full(own, context.options.rank, context.seed(module, cluster))
        stored = basis.rounded(context.dtype)
        norms = own.norms.view(-1, 1, 1)
        cores = (unit_cores(own, stored) * norms).to(context.dtype)
        relative = relative_errors(own, stored, cores / norms)
        squared_errors[list(own.members)] = (relative * own.norms.square()).numpy()

        members = np.flatnonzero(labels == cluster)
        rows = torch.zeros(len(members), *cores.shape[1:], dtype=context.dtype)
        rows[np.searchsorted(members, own.members)] = cores
        part[f"{module}.U"] = basis.U.to(context.dtype).contiguous()
        part[f"{module}.V"] = basis.V.to(context.dtype).contiguous()
        part[module] = rows
    return squared_errors


def _measure_only(context: JobContext, module: str, stack: FactorStack, labels: Labels) -> NDArray[np.float64]:
    squared_errors = np.zeros(len(labels))
    for cluster in np.unique(labels):
        own = _select(stack, labels, int(cluster))
        if own is not None:
            basis = jd_full(own, context.options.rank, context.seed(module, int(cluster)))
            relative = (1 - captured_energy(own, basis)).clamp_min(0)
            squared_errors[list(own.members)] = (relative * own.norms.square()).numpy()
    return squared_errors


def _select(stack: FactorStack, labels: Labels, cluster: int) -> FactorStack | None:
    positions = [i for i, member in enumerate(stack.members) if labels[member] == cluster]
    return stack.select(positions) if positions else None
