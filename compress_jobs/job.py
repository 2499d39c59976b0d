"""The main job: list, inspect, cluster, fit, grade, assemble, verify, publish.

The driver sees figures and hashes; nothing of the collection's tensors passes through it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import numpy as np

from cluster.adapter import AdapterFiles, AdapterRecord, list_adapters
from cluster.base import read_base
from cluster.bundle import read_current, read_manifest
from cluster.clustering import Assignment, Labels, one_cluster, sample_modules
from cluster.errors import AdapterChanged, BundleError, ConfigError, CtsError, StoreMissing
from cluster.manifest import Adapter, Base, Cluster, Manifest, Refused
from cluster.publish import missing_objects, publish
from cluster.store import Store
from cluster.svd import errors_at_equal_bytes
from compress_jobs import tasks
from compress_jobs.assemble import AssembledCluster, StandaloneAdapter
from compress_jobs.context import JobContext
from compress_jobs.fit_layer import Errors, LayerFit
from compress_jobs.options import RunOptions
from compress_jobs.progress import say, track
from compress_jobs.summary import ErrorFigure, Summary

_LAYER = re.compile(r"(.*?\.\d+)\.")


@dataclass(frozen=True)
class Outcome:
    """``summary`` is None when the run found its bundle published already."""

    manifest: Manifest
    summary: Summary | None


@dataclass(frozen=True)
class AdapterError:
    """The three figures of a manifest entry: energy-weighted over all modules, plain mean, worst module."""

    error: float
    unweighted: float
    worst_module: float

    @staticmethod
    def of(record: AdapterRecord, squared_errors: dict[str, float]) -> AdapterError:
        touched = {module: places.energy for module, places in record.modules.items() if places.energy > 0}
        relative = [squared_errors[module] / energy for module, energy in touched.items()]
        total = math.fsum(squared_errors[module] for module in touched) / math.fsum(touched.values())
        return AdapterError(total, math.fsum(relative) / len(relative), max(relative))


@dataclass
class Job:
    """State of one run, filled phase by phase. Adapter indices count ``fitted``."""

    context: JobContext
    store: Store
    folders: list[AdapterFiles]
    seen_current: str | None
    in_flight: int = 1
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    records_read: dict[str, AdapterRecord] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    fitted: list[str] = field(default_factory=list)
    assignment: Assignment | None = None
    layers: list[list[str]] = field(default_factory=list)
    fits: list[LayerFit] = field(default_factory=list)
    assembled: dict[int, AssembledCluster] = field(default_factory=dict)
    slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    standalone: dict[str, StandaloneAdapter] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def labels(self) -> Labels:
        assert self.assignment is not None
        return self.assignment.labels

    def errors(self, squared_errors: list[Errors]) -> list[AdapterError]:
        """Of every fitted adapter, from ||M - M^||^2 by layer."""
        modules = {module: errors for layer in squared_errors for module, errors in layer.items()}
        return [
            AdapterError.of(self.records_read[adapter_id], {m: float(errors[i]) for m, errors in modules.items()})
            for i, adapter_id in enumerate(self.fitted)
        ]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


def prepare(options: RunOptions) -> Job:
    """Look at everything from outside that can be wrong before Ray is asked for anything: the base, the
    store that will be published on, the collection. Raises CtsError within half a minute."""
    base = read_base(options.base, name=options.base_name or None, accept=options.accept_base)
    context = JobContext(uuid4().hex[:12], options, base, tuple(sample_modules(list(base.modules))))
    store = context.out()
    # Before hours are spent: may this store be published on at all?
    store.check_conditional_writes()
    current = read_current(store)
    try:
        folders = list_adapters(context.adapters())
    except StoreMissing as error:
        raise StoreMissing(f"--adapters: {error}") from None
    if not folders:
        raise ConfigError(f"--adapters {options.adapters}: no adapter there; expected folders with adapter_config.json")
    say(f"{len(folders)} adapters in {options.adapters}")
    return Job(context, store, folders, seen_current=current[1] if current else None)


def run(job: Job) -> Outcome:
    """Compress the collection and publish it. Ray must be connected.

    Raises CtsError; then nothing new is visible in the store.
    """
    job.in_flight = job.context.options.in_flight or tasks.default_in_flight()
    try:
        with job.phase("inspect"):
            _inspect(job)
        if (published := _already_published(job)) is not None:
            return Outcome(published, None)
        with job.phase("cluster"):
            _cluster(job)
        with job.phase("fit"):
            _fit(job)
        with job.phase("assemble"):
            _assemble(job)
        manifest = _manifest(job)
        summary = _summary(job, manifest)
        manifest = publish(job.store, manifest, summary.to_json(), job.seen_current)
        return Outcome(manifest, summary)
    finally:
        _clean_up(job)


def _inspect(job: Job) -> None:
    """Pass 1."""
    options = job.context.options
    calls = [(job.context, files) for files in job.folders]
    for _, result in track(tasks.run_bounded(tasks.inspect_task, calls, job.in_flight), len(calls), "inspect"):
        if result.record is not None:
            job.records[result.adapter_id] = result.record
        else:
            job.refused[result.adapter_id] = Refused(result.refused.reason, result.refused.message)
    job.records = dict(sorted(job.records.items()))
    job.records_read = dict(job.records)
    for adapter_id, refusal in sorted(job.refused.items()):
        say(f"refused {adapter_id} ({refusal.reason}): {refusal.message}")
    if not job.records:
        raise ConfigError(
            f"--adapters {options.adapters}: none of the {len(calls)} adapters can be accepted; see above"
        )
    for pattern in options.raw:
        if not fnmatch.filter(job.records, pattern):
            raise ConfigError(
                f"--raw {pattern}: matches none of the accepted adapters; give an id, or a pattern with *"
            )
    if options.method == "jd-full":
        job.fitted = [adapter_id for adapter_id in job.records if not options.is_raw(adapter_id)]


def _already_published(job: Job) -> Manifest | None:
    """The current revision, if it came from these very inputs and options and is whole."""
    current = read_current(job.store)
    if current is None:
        return None
    try:
        manifest = read_manifest(job.store, current[0].bundle, current[0].revision)
    except (StoreMissing, BundleError):
        return None
    base = job.context.base
    same = (
        manifest.base == Base(base.name, base.fingerprint)
        and manifest.method == job.context.options.recorded_method()
        and {adapter_id: adapter.version for adapter_id, adapter in manifest.adapters.items()}
        == {adapter_id: record.version for adapter_id, record in job.records.items()}
        and manifest.refused == job.refused
    )
    return manifest if same and not missing_objects(job.store, manifest) else None


def _cluster(job: Job) -> None:
    if not job.fitted:
        return
    wanted = job.context.options.clusters
    num_clusters = min(wanted, len(job.fitted))
    if num_clusters < wanted:
        say(f"--clusters {wanted} is more than the {len(job.fitted)} adapters to cluster: using {num_clusters}")
    say(f"cluster: {len(job.fitted)} adapters into {num_clusters}")
    if num_clusters == 1:
        job.assignment = one_cluster(len(job.fitted))
        return
    job.assignment = tasks.run_one(tasks.cluster_task, job.context, job.fitted, num_clusters)


def _fit(job: Job) -> None:
    """Pass 2."""
    if job.assignment is None:
        return
    records = [job.records[adapter_id] for adapter_id in job.fitted]
    job.layers = group_by_layer(
        [module for module in job.context.base.modules if any(module in record.modules for record in records)]
    )
    labels, random_labels = job.assignment.labels, job.assignment.random_labels
    calls = [
        (job.context, index, modules, [_only_modules(record, modules) for record in records], labels, random_labels)
        for index, modules in enumerate(job.layers)
    ]
    fits: dict[int, LayerFit] = {}
    for index, fit in track(tasks.run_bounded(tasks.fit_layer_task, calls, job.in_flight), len(calls), "fit layers"):
        fits[index] = fit
    job.fits = [fits[index] for index in range(len(calls))]
    for fit in job.fits:
        for index, message in fit.changed.items():
            _drop_changed(job, job.fitted[index], message)


def _assemble(job: Job) -> None:
    """Grade every adapter by the gate, then write each cluster and each adapter that stands alone."""
    options = job.context.options
    basis_errors = job.errors([fit.squared_errors for fit in job.fits])
    on_basis: dict[int, list[str]] = {}
    alone = []
    for index, adapter_id in enumerate(job.fitted):
        if adapter_id in job.records:
            if basis_errors[index].error <= options.gate:
                on_basis.setdefault(int(job.labels[index]), []).append(adapter_id)
            else:
                alone.append(adapter_id)
    alone += [adapter_id for adapter_id in job.records if adapter_id not in set(job.fitted)]

    calls = []
    for cluster, kept in sorted(on_basis.items()):
        members = [job.fitted[i] for i in np.flatnonzero(job.labels == cluster)]
        calls.append((job.context, cluster, len(job.layers), [members.index(adapter_id) for adapter_id in kept]))
        job.slots |= {adapter_id: (cluster, slot) for slot, adapter_id in enumerate(kept)}
    for index, result in track(tasks.run_bounded(tasks.assemble_task, calls, job.in_flight), len(calls), "assemble"):
        job.assembled[calls[index][1]] = result

    alone_calls = [(job.context, job.records[adapter_id]) for adapter_id in alone]
    results = tasks.run_bounded(tasks.standalone_task, alone_calls, job.in_flight)
    for index, result in track(results, len(alone_calls), "stand alone"):
        if isinstance(result, AdapterChanged):
            _drop_changed(job, alone[index], result.message)
        else:
            job.standalone[alone[index]] = result
    if not job.slots and not job.standalone:
        raise BundleError("every adapter changed during the job; nothing is left to publish, run it again")


def _drop_changed(job: Job, adapter_id: str, message: str) -> None:
    if job.records.pop(adapter_id, None) is not None:
        job.slots.pop(adapter_id, None)
        job.refused[adapter_id] = Refused("changed", message)
        say(f"refused {adapter_id} (changed): {message}")


def _manifest(job: Job) -> Manifest:
    basis_errors = dict(zip(job.fitted, job.errors([fit.squared_errors for fit in job.fits]), strict=True))
    adapters = {}
    for adapter_id, record in job.records.items():
        alone = job.standalone.get(adapter_id)
        error = AdapterError.of(record, alone.squared_errors) if alone else basis_errors[adapter_id]
        cluster, slot = (None, None) if alone else job.slots[adapter_id]
        adapters[adapter_id] = Adapter(
            version=record.version,
            etag=record.etag,
            mode=alone.mode if alone else "core",
            served=alone.served if alone else job.assembled[int(cluster or 0)].served[int(slot or 0)],
            error=error.error,
            error_unweighted=error.unweighted,
            error_worst_module=error.worst_module,
            cluster=None if alone else str(cluster),
            slot=slot,
            factors=alone.factors.sha if alone else None,
            rank=alone.rank if alone else None,
        )
    stored = [stored for result in job.assembled.values() for stored in (result.basis, result.cores)]
    stored += [result.factors for adapter_id, result in job.standalone.items() if adapter_id in job.records]
    base = job.context.base
    touched = {module for record in job.records.values() for module in record.modules}
    return Manifest(
        bundle="",
        revision=0,
        parent=None,
        base=Base(base.name, base.fingerprint),
        method=job.context.options.recorded_method(),
        modules={module: shape for module, shape in base.modules.items() if module in touched},
        clusters={
            str(cluster): Cluster(result.basis.sha, result.cores.sha, len(result.served))
            for cluster, result in sorted(job.assembled.items())
        },
        adapters=adapters,
        refused=dict(sorted(job.refused.items())),
        objects={item.sha: item.size_bytes for item in stored},
    ).with_own_id()


def _summary(job: Job, manifest: Manifest) -> Summary:
    modes = [adapter.mode for adapter in manifest.adapters.values()]
    compared = [adapter_id for adapter_id in job.fitted if adapter_id in manifest.adapters]
    on_basis = dict(zip(job.fitted, job.errors([fit.squared_errors for fit in job.fits]), strict=True))
    at_random = dict(zip(job.fitted, job.errors([fit.random_squared_errors for fit in job.fits]), strict=True))
    served = compared or [
        adapter_id for adapter_id, adapter in manifest.adapters.items() if adapter.mode == "truncated"
    ]
    return Summary(
        bundle=manifest.bundle,
        num_adapters=len(manifest.adapters),
        num_on_basis=modes.count("core"),
        num_truncated=modes.count("truncated"),
        num_raw=modes.count("raw"),
        num_refused=len(manifest.refused),
        cluster_sizes={name: cluster.num_slots for name, cluster in manifest.clusters.items()},
        num_modules=len(manifest.modules),
        bytes_before=sum(job.records[adapter_id].size_bytes for adapter_id in manifest.adapters),
        bytes_after=manifest.resident_bytes(),
        served=ErrorFigure.of({adapter_id: manifest.adapters[adapter_id].error for adapter_id in served}),
        on_basis=ErrorFigure.of({adapter_id: on_basis[adapter_id].error for adapter_id in compared}),
        random_split=ErrorFigure.of({adapter_id: at_random[adapter_id].error for adapter_id in compared}),
        svd_equal_bytes=ErrorFigure.of(_svd_errors(job, manifest, compared)),
        clustering_start=job.assignment.start if job.assignment else "",
        seconds=dict(job.seconds),
        bytes_read=sum(record.size_bytes for record in job.records_read.values())
        + sum(fit.num_bytes_read for fit in job.fits),
        peak_task_memory_bytes=max((fit.peak_memory_bytes for fit in job.fits), default=0),
    )


def _svd_errors(job: Job, manifest: Manifest, compared: list[str]) -> dict[str, float]:
    """The compared adapters by plain SVD, in the bytes that they take in the bundle."""
    if not compared:
        return {}
    budget = manifest.resident_bytes() - sum(
        manifest.objects[str(adapter.factors)]
        for adapter_id, adapter in manifest.adapters.items()
        if adapter.factors and adapter_id not in compared
    )
    by_adapter: dict[str, dict[str, Any]] = {adapter_id: {} for adapter_id in compared}
    for fit in job.fits:
        for module, spectra in fit.spectra.items():
            for index, spectrum in spectra.items():
                if job.fitted[index] in by_adapter:
                    by_adapter[job.fitted[index]][module] = spectrum
    itemsize = job.context.dtype.itemsize
    component_bytes = {module: (shape.d_out + shape.d_in) * itemsize for module, shape in manifest.modules.items()}
    return errors_at_equal_bytes(by_adapter, component_bytes, budget)


def group_by_layer(modules: list[str]) -> list[list[str]]:
    """Modules of one layer together (their factors lie side by side in a file), in the model's order."""
    layers: dict[str, list[str]] = {}
    for module in modules:
        found = _LAYER.match(module)
        layers.setdefault(found[1] if found else module, []).append(module)
    return list(layers.values())


def _only_modules(record: AdapterRecord, modules: list[str]) -> AdapterRecord:
    return replace(record, modules={module: record.modules[module] for module in modules if module in record.modules})


def _clean_up(job: Job) -> None:
    """Parts are worth nothing once the job is over; failing to remove them must not hide how it ended."""
    try:
        for entry in list(job.store.list(job.context.work)):
            job.store.delete(entry.key)
    except CtsError as error:
        say(f"could not clean up {job.store.uri}/{job.context.work}: {error}")
