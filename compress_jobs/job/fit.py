"""Pass 2: layer by layer, read its factors from every adapter, fit each cluster's bases, measure every adapter.

While one layer is computed the next one is read; memory is bounded by the factors of these two.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from cluster.adapters.factors import Factors
from cluster.adapters.reading import read_modules
from cluster.adapters.record import AdapterRecord
from cluster.compression.basis import relative_errors
from cluster.compression.methods import METHODS
from cluster.compression.stack import FactorStack, stack_factors
from cluster.errors import AdapterChanged
from compress_jobs.job.context import JobContext, peak_memory_bytes
from compress_jobs.job.parts import once, tensors_stand, write_tensors

_READS_AT_ONCE = 8


@dataclass(frozen=True)
class Layer:
    """Its number, its modules, and where each adapter's factors of them lie (N records, cut to these modules)."""

    number: int
    modules: list[str]
    records: list[AdapterRecord]


@dataclass(frozen=True)
class LayerFit:
    """What the driver learns of a layer: figures, no tensors of the collection.

    ``squared_errors``: module -> ||M - M^||^2 of every adapter (N,), 0 where it does not touch the module.
    ``changed``: adapter index -> message.
    """

    squared_errors: dict[str, list[float]] = field(default_factory=dict)
    changed: dict[int, str] = field(default_factory=dict)
    num_bytes_read: int = 0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class _Read:
    factors: list[dict[str, Factors]]
    changed: dict[int, str]
    num_bytes: int


def fit_layers(context: JobContext, layers: Sequence[Layer], labels: Sequence[int]) -> list[LayerFit]:
    """Fit some layers and leave, for every layer and cluster, a part with its bases and its members' cores.

    A part holds ``<module>.U``, ``<module>.V`` and ``<module>`` (members, r_U, r_V) or (members, r) in the order of
    the cluster's members, in the dtype they will be served in. An adapter whose file has changed is reported and
    left out.
    """
    fits = []
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        reading: dict[int, Future[_Read]] = {}

        def start_reading(index: int) -> None:
            if index < len(layers):
                reading[index] = ahead.submit(_read, context, layers[index], pool)

        def fit(index: int) -> LayerFit:
            if index not in reading:
                start_reading(index)
            read = reading.pop(index).result()
            start_reading(index + 1)
            return _fit_layer(context, layers[index], read, np.asarray(labels))

        def stands(layer: Layer, done: LayerFit) -> bool:
            keys = [context.fit_key(layer.number, cluster) for cluster in sorted(set(labels))]
            return not done.changed and tensors_stand(context, keys)

        for index, layer in enumerate(layers):
            name = f"{context.fits}{layer.number}"
            fits.append(once(context, name, LayerFit, partial(fit, index), partial(stands, layer)))
    return fits


def _fit_layer(context: JobContext, layer: Layer, read: _Read, labels: np.ndarray) -> LayerFit:
    squared_errors: dict[str, list[float]] = {}
    parts: dict[int, dict[str, torch.Tensor]] = {int(cluster): {} for cluster in np.unique(labels)}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray hides the GPUs that the task has not asked for
    for module in layer.modules:
        # Taken out of ``factors``: what has been stacked is not held twice.
        stack = stack_factors([(i, found.pop(module)) for i, found in enumerate(read.factors) if module in found])
        if stack is not None:
            squared_errors[module] = _fit_module(context, module, stack.to(device), labels, parts)
    for cluster, part in parts.items():
        write_tensors(context, context.fit_key(layer.number, cluster), part)
    return LayerFit(squared_errors, read.changed, read.num_bytes, peak_memory_bytes())


def _read(context: JobContext, layer: Layer, pool: ThreadPoolExecutor) -> _Read:
    store = context.adapters()
    changed: dict[int, str] = {}

    def read_one(index: int) -> dict[str, Factors]:
        try:
            return read_modules(store, layer.records[index], layer.modules)
        except AdapterChanged as error:
            changed[index] = error.message
            return {}

    factors = list(pool.map(read_one, range(len(layer.records))))
    places = [
        record.modules[module] for record in layer.records for module in layer.modules if module in record.modules
    ]
    return _Read(factors, changed, sum(place.end - place.start for pair in places for place in (pair.A, pair.B)))


def _fit_module(
    context: JobContext, module: str, stack: FactorStack, labels: np.ndarray, parts: dict[int, dict[str, torch.Tensor]]
) -> list[float]:
    """Add the module to every cluster's part; returns the squared errors of what will be served."""
    method = METHODS[context.options.method]
    squared_errors = np.zeros(len(labels))
    for cluster, part in parts.items():
        own = _select(stack, labels, cluster)
        if own is None:
            continue
        basis = method.fit(own, int(context.options.rank), context.seed(module, cluster))
        stored = basis.rounded(context.dtype)
        unit = method.cores(own, stored)
        norms = own.norms.view(-1, *[1] * (unit.dim() - 1))
        cores = (unit * norms).to(context.dtype)
        lost = relative_errors(own, stored, cores / norms) * own.norms.square()
        squared_errors[list(own.members)] = lost.cpu().numpy()

        members = np.flatnonzero(labels == cluster)
        rows = torch.zeros(len(members), *cores.shape[1:], dtype=context.dtype)
        rows[np.searchsorted(members, own.members)] = cores.cpu()
        part[f"{module}.U"] = basis.U.to("cpu", context.dtype).contiguous()
        part[f"{module}.V"] = basis.V.to("cpu", context.dtype).contiguous()
        part[module] = rows
    return squared_errors.tolist()


def _select(stack: FactorStack, labels: np.ndarray, cluster: int) -> FactorStack | None:
    positions = [i for i, member in enumerate(stack.members) if labels[member] == cluster]
    return stack.select(positions) if positions else None
