"""Pass 2: layer by layer, read its factors from every adapter, fit each cluster's bases, measure every adapter.

``fit_all`` hands layers to Ray tasks; ``fit_layers`` is what a task does.

While one layer is computed the next one is read; memory is bounded by the factors of these two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from cluster.adapters.base import BaseModel
from cluster.adapters.factors import Factors
from cluster.adapters.reading import read_modules
from cluster.adapters.record import AdapterRecord
from cluster.compression.basis import relative_errors
from cluster.compression.methods import METHODS
from cluster.compression.stack import FactorStack, stack_factors
from cluster.errors import AdapterChanged
from compress_jobs.job import tasks
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.choose import Chosen
from compress_jobs.job.cluster import Clustered
from compress_jobs.job.context import JobContext, peak_memory_bytes
from compress_jobs.job.parts import once, tensors_stand, write_tensors
from compress_jobs.job.prepare import Job
from compress_jobs.progress import track

_LAYER = re.compile(r"(.*?\.\d+)\.")
_PROCESS_BYTES = 600 << 20
# Layers of one task: while one is computed the next is read.
_LAYERS_A_TASK = 4
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
class Fitted:
    """All layers. ``adapter_ids`` are those that were fitted, ``labels`` their clusters; ``squared_errors``: module ->
    ||M - M^||^2 of every one of them, 0 where it does not touch the module; ``changed``: adapter id -> how its file was
    found to be another than the one inspected."""

    adapter_ids: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    num_layers: int = 0
    squared_errors: dict[str, list[float]] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0
    peak_memory_bytes: int = 0

    def errors(self, records: Mapping[str, AdapterRecord]) -> dict[str, AdapterError]:
        """Of every fitted adapter that is in ``records``, on its basis, before the gate."""
        return {
            adapter_id: AdapterError.of(
                records[adapter_id], {m: errors[i] for m, errors in self.squared_errors.items()}
            )
            for i, adapter_id in enumerate(self.adapter_ids)
            if adapter_id in records
        }


@dataclass(frozen=True)
class _Read:
    factors: list[dict[str, Factors]]
    changed: dict[int, str]
    num_bytes: int


def fit_all(job: Job, chosen: Chosen, clustered: Clustered | None) -> Fitted:
    """Raises ConfigError when no node of the Ray cluster has the memory for it."""
    if clustered is None:
        return Fitted()
    base, records = chosen.context.base, list(chosen.records.values())
    touched = [module for module in base.modules if any(module in record.modules for record in records)]
    layers = [
        Layer(number, modules, [_only_modules(record, modules) for record in records])
        for number, modules in enumerate(group_by_layer(touched))
    ]
    size = max(1, min(_LAYERS_A_TASK, len(layers) // job.in_flight))
    calls = [(chosen.context, layers[i : i + size], clustered.labels) for i in range(0, len(layers), size)]
    task = tasks.with_memory(tasks.remote(fit_layers), _memory_bytes(base, layers))
    results = tasks.run_bounded(task, calls, job.in_flight)
    by_layer = ((index * size + i, fit) for index, fits in results for i, fit in enumerate(fits))
    found = dict(track(by_layer, len(layers), "fit layers"))
    fits = [found[number] for number in range(len(layers))]
    adapter_ids = tuple(chosen.records)
    return Fitted(
        adapter_ids=adapter_ids,
        labels=tuple(clustered.labels),
        num_layers=len(layers),
        squared_errors={module: errors for fit in fits for module, errors in fit.squared_errors.items()},
        # Of several layers' messages on one adapter the first.
        changed={adapter_ids[index]: message for fit in reversed(fits) for index, message in fit.changed.items()},
        bytes_read=sum(fit.num_bytes_read for fit in fits),
        peak_memory_bytes=max(fit.peak_memory_bytes for fit in fits),
    )


def group_by_layer(modules: list[str]) -> list[list[str]]:
    """Modules of one layer together (their factors lie side by side in a file), in the model's order."""
    layers: dict[str, list[str]] = {}
    for module in modules:
        found = _LAYER.match(module)
        layers.setdefault(found[1] if found else module, []).append(module)
    return list(layers.values())


def _only_modules(record: AdapterRecord, modules: list[str]) -> AdapterRecord:
    return replace(record, modules={module: record.modules[module] for module in modules if module in record.modules})


def _memory_bytes(base: BaseModel, layers: list[Layer]) -> int:
    """What a fit task may hold: the process itself, this layer's and the next one's factors in float32, and what is
    stacked of them."""
    largest = max(
        sum(
            places.rank * (base.modules[module].d_out + base.modules[module].d_in)
            for record in layer.records
            for module, places in record.modules.items()
        )
        for layer in layers
    )
    return _PROCESS_BYTES + 3 * 4 * largest


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
