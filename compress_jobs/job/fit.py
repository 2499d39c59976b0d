"""Pass 2: read the factors of some layers from the adapters of some clusters, fit each cluster's bases, measure every
adapter.

``fit_all`` hands layers and groups of clusters to Ray tasks; ``fit_layers`` is what a task does. While the layers of
one request are computed those of the next are read; memory is bounded by the factors of both, and so by
``--task-memory``.
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
from compress_jobs.progress import say, track

_LAYER = re.compile(r"(.*?\.\d+)\.")
_PROCESS_BYTES = 600 << 20
# Of a task, and of one request for an adapter's factors.
_LAYERS_A_TASK, _LAYERS_A_READ = 8, 4
_READS_AT_ONCE = 8


@dataclass(frozen=True)
class Layer:
    """Its number in the model's order, and its modules."""

    number: int
    modules: list[str]


@dataclass(frozen=True)
class Group:
    """Clusters ``first`` to ``last``; their n adapters by their numbers in the collection, with their clusters and
    where their factors lie."""

    first: int
    last: int
    adapters: list[int]
    labels: list[int]
    records: list[AdapterRecord]

    @staticmethod
    def of(clusters: Sequence[int], labels: Sequence[int], records: Sequence[AdapterRecord]) -> Group:
        """``clusters``: consecutive ones."""
        adapters = [i for i, label in enumerate(labels) if clusters[0] <= label <= clusters[-1]]
        own = [labels[i] for i in adapters]
        return Group(clusters[0], clusters[-1], adapters, own, [records[i] for i in adapters])

    def cut(self, modules: Sequence[str]) -> Group:
        """With only these modules' places."""
        return replace(self, records=[_only_modules(record, modules) for record in self.records])

    def part(self, context: JobContext, layer: Layer) -> str:
        return f"{context.fits}{self.first}-{self.last}/{layer.number}"


@dataclass(frozen=True)
class LayerFit:
    """What the driver learns of a layer and a group: figures, no tensors of the collection.

    ``squared_errors``: module -> ||M - M^||^2 of every adapter of the group (n,), 0 where it does not touch the module.
    ``changed``: position in the group -> message.
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


def fit_all(job: Job, chosen: Chosen, clustered: Clustered | None) -> Fitted:
    """Raises NotEnoughMemory when a single cluster takes more memory than a task may, or than any node has."""
    if clustered is None:
        return Fitted()
    base, records, labels = chosen.context.base, list(chosen.records.values()), clustered.labels
    touched = [module for module in base.modules if any(module in record.modules for record in records)]
    layers = [Layer(number, modules) for number, modules in enumerate(group_by_layer(touched))]
    held = _cluster_bytes(base, layers, records, labels)
    room = tasks.memory_of_a_task(job.asked.task_memory, _PROCESS_BYTES + _held(held, 1)) - _PROCESS_BYTES
    layers_a_read = max(1, min(_LAYERS_A_READ, len(layers) // job.in_flight))
    groups = [Group.of(clusters, labels, records) for clusters in _grouped(held, layers_a_read, room)]
    # Layers that lie side by side in a file are one request.
    in_file = sorted(layers, key=partial(_place, records))
    size = max(1, min(_LAYERS_A_TASK, len(layers) * len(groups) // job.in_flight))
    runs = [in_file[i : i + size] for i in range(0, len(layers), size)]
    most = max(sum(held[group.first : group.last + 1]) for group in groups)
    at_once = max(1, min(layers_a_read, room // _held([most], 1)))
    calls = [
        (chosen.context, run, at_once, group.cut([module for layer in run for module in layer.modules]))
        for run in runs
        for group in groups
    ]
    task = tasks.with_memory(tasks.remote(fit_layers), _PROCESS_BYTES + _held([most], at_once))
    squared_errors = {module: [0.0] * len(records) for module in touched}
    changed: dict[int, str] = {}
    bytes_read = peak = 0
    say(f"fit: {len(layers)} layers, clusters in {len(groups)} groups")
    for index, fits in track(tasks.run_bounded(task, calls, job.in_flight), len(calls), "fit"):
        adapters = calls[index][3].adapters
        for fit in fits:
            for module, errors in fit.squared_errors.items():
                for adapter, error in zip(adapters, errors, strict=True):
                    squared_errors[module][adapter] = error
            for position, message in fit.changed.items():
                changed.setdefault(adapters[position], message)
            bytes_read, peak = bytes_read + fit.num_bytes_read, max(peak, fit.peak_memory_bytes)
    adapter_ids = tuple(chosen.records)
    return Fitted(
        adapter_ids=adapter_ids,
        labels=tuple(labels),
        num_layers=len(layers),
        squared_errors=squared_errors,
        changed={adapter_ids[index]: message for index, message in sorted(changed.items())},
        bytes_read=bytes_read,
        peak_memory_bytes=peak,
    )


def group_by_layer(modules: list[str]) -> list[list[str]]:
    """Modules of one layer together (their factors lie side by side in a file), in the model's order."""
    layers: dict[str, list[str]] = {}
    for module in modules:
        found = _LAYER.match(module)
        layers.setdefault(found[1] if found else module, []).append(module)
    return list(layers.values())


def _only_modules(record: AdapterRecord, modules: Sequence[str]) -> AdapterRecord:
    return replace(record, modules={module: record.modules[module] for module in modules if module in record.modules})


def _place(records: Sequence[AdapterRecord], layer: Layer) -> int:
    """Where the layer lies in the file of the first adapter that has it."""
    own = (
        [record.modules[module].A.start for module in layer.modules if module in record.modules] for record in records
    )
    return min(next(filter(None, own)))


def _cluster_bytes(
    base: BaseModel, layers: Sequence[Layer], records: Sequence[AdapterRecord], labels: Sequence[int]
) -> list[int]:
    """Of each cluster's factors in float32, at the layer where they are most."""
    most = [0] * (max(labels) + 1)
    for layer in layers:
        own = [0] * len(most)
        for record, label in zip(records, labels, strict=True):
            for module in layer.modules:
                if (places := record.modules.get(module)) is not None:
                    own[label] += 4 * places.rank * (base.modules[module].d_out + base.modules[module].d_in)
        most = list(map(max, most, own))
    return most


def _held(cluster_bytes: Sequence[int], layers_a_read: int) -> int:
    """What a fit of the largest cluster may hold besides the process: the layers of this request and of the next, and
    what is stacked of them."""
    return 3 * layers_a_read * max(cluster_bytes)


def _grouped(cluster_bytes: Sequence[int], layers_a_read: int, room: int) -> list[list[int]]:
    """Consecutive clusters of a task: as many as leave room for whole requests, one at least."""
    groups: list[list[int]] = []
    held = room
    for cluster, size in enumerate(cluster_bytes):
        held += _held([size], layers_a_read)
        if not groups or held > room:
            groups.append([])
            held = _held([size], layers_a_read)
        groups[-1].append(cluster)
    return groups


def fit_layers(context: JobContext, layers: Sequence[Layer], layers_a_read: int, group: Group) -> list[LayerFit]:
    """Fit some layers and leave, for every layer and cluster, a part with its bases and its members' cores.

    A part holds ``<module>.U``, ``<module>.V`` and ``<module>`` (members, r_U, r_V) or (members, r) in the order of
    the cluster's members, in the dtype they will be served in. An adapter whose file has changed is reported and
    left out.
    """
    fits = []
    runs = [layers[i : i + layers_a_read] for i in range(0, len(layers), layers_a_read)]
    with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        reading: dict[int, Future[_Read]] = {}

        def start_reading(number: int, run: Sequence[Layer]) -> None:
            reading[number] = ahead.submit(_read, context, group, run, pool)

        def fit(number: int, position: int) -> LayerFit:
            """The layer at ``position`` of run ``number``, which is read from there on unless it has been."""
            if number not in reading:
                start_reading(number, runs[number][position:])
            read = reading[number].result()
            if number + 1 < len(runs) and number + 1 not in reading:
                start_reading(number + 1, runs[number + 1])
            return _fit_layer(context, runs[number][position], read, group)

        def stands(layer: Layer, done: LayerFit) -> bool:
            keys = [context.fit_key(layer.number, cluster) for cluster in range(group.first, group.last + 1)]
            return not done.changed and tensors_stand(context, keys)

        for number, run in enumerate(runs):
            for position, layer in enumerate(run):
                step = partial(fit, number, position)
                fits.append(once(context, group.part(context, layer), LayerFit, step, partial(stands, layer)))
            reading.pop(number, None)
    return fits


def _fit_layer(context: JobContext, layer: Layer, read: _Read, group: Group) -> LayerFit:
    labels = np.asarray(group.labels)
    squared_errors: dict[str, list[float]] = {}
    parts: dict[int, dict[str, torch.Tensor]] = {cluster: {} for cluster in range(group.first, group.last + 1)}
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Ray hides the GPUs that the task has not asked for
    for module in layer.modules:
        # Taken out of ``factors``: what has been stacked is not held twice.
        stack = stack_factors([(i, found.pop(module)) for i, found in enumerate(read.factors) if module in found])
        if stack is not None:
            squared_errors[module] = _fit_module(context, module, stack.to(device), labels, parts)
    for cluster, part in parts.items():
        write_tensors(context, context.fit_key(layer.number, cluster), part)
    return LayerFit(squared_errors, read.changed, _num_bytes(group, layer), peak_memory_bytes())


def _read(context: JobContext, group: Group, layers: Sequence[Layer], pool: ThreadPoolExecutor) -> _Read:
    store = context.adapters()
    modules = [module for layer in layers for module in layer.modules]
    changed: dict[int, str] = {}

    def read_one(position: int) -> dict[str, Factors]:
        try:
            return read_modules(store, group.records[position], modules)
        except AdapterChanged as error:
            changed[position] = error.message
            return {}

    return _Read(list(pool.map(read_one, range(len(group.records)))), changed)


def _num_bytes(group: Group, layer: Layer) -> int:
    places = [
        record.modules[module] for record in group.records for module in layer.modules if module in record.modules
    ]
    return sum(place.end - place.start for pair in places for place in (pair.A, pair.B))


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
