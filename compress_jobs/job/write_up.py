"""What a run publishes and tells: its manifest, and the summary that becomes report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.bundle.manifest import Adapter, Base, Cluster, Manifest, Method, with_slots
from cluster.compression.choose import Choice, choose_svd
from cluster.compression.svd import errors_at_equal_bytes
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.alternatives import Alternatives
from compress_jobs.job.assemble import Assembled
from compress_jobs.job.brought import brought_fields, templates_of
from compress_jobs.job.choose import Chosen, collection_shape
from compress_jobs.job.cluster import Clustered
from compress_jobs.job.costs import Costs
from compress_jobs.job.fit import Fitted
from compress_jobs.job.gate import Gate
from compress_jobs.job.grade import Grades
from compress_jobs.job.inspect import Collection
from compress_jobs.job.options import RunOptions
from compress_jobs.job.prepare import Job
from compress_jobs.report.summary import ErrorFigure, Summary


@dataclass(frozen=True)
class Compressed:
    """What the steps of a run have returned. ``collection``: the adapters that are served, and those refused;
    ``errors_on_bases``: of those that were fitted, before the gate; ``alternatives`` to it, where many stand alone."""

    job: Job
    collection: Collection
    chosen: Chosen
    clustered: Clustered | None
    fitted: Fitted
    errors_on_bases: Mapping[str, AdapterError]
    gate: Gate
    grades: Grades
    assembled: Assembled
    alternatives: Alternatives | None

    @property
    def asked(self) -> RunOptions:
        return self.job.asked

    def method(self) -> Method:
        """As the manifest records it."""
        options, gate = self.chosen.context.options, self.gate
        name, clusters, rank = options.method, int(options.clusters), int(options.rank)
        return self.asked.recorded_method(name, clusters, rank, gate.gate, gate.evidence, self.job.tasks)


def manifest_of(done: Compressed) -> Manifest:
    """Named by its content; its objects are stored already."""
    context, records, assembled = done.chosen.context, done.collection.records, done.assembled
    stored = [stored for result in assembled.clusters.values() for stored in (result.basis, result.cores)]
    stored += [result.factors for result in assembled.standalone.values()]
    touched = {module for record in records.values() for module in record.modules}
    accepted = tuple(sorted(context.base.accepted_names - {context.base.name}))
    return Manifest(
        bundle="",
        revision=0,
        parent=None,
        base=Base(context.base.name, context.base.fingerprint, accepted),
        method=done.method(),
        modules={module: shape for module, shape in context.base.modules.items() if module in touched},
        clusters={
            str(cluster): Cluster(result.basis.sha, result.cores.sha, len(result.served))
            for cluster, result in sorted(assembled.clusters.items())
        },
        adapters=with_slots({adapter_id: _entry(done, adapter_id) for adapter_id in records}),
        refused=dict(sorted(done.collection.refused.items())),
        objects={item.sha: item.size_bytes for item in stored},
        templates=templates_of(records.values()),
        layout=done.asked.layout,
    ).with_own_id()


def _entry(done: Compressed, adapter_id: str) -> Adapter:
    record, assembled = done.collection.records[adapter_id], done.assembled
    if (alone := assembled.standalone.get(adapter_id)) is not None:
        error = AdapterError.of(record, alone.squared_errors)
        mode, served = alone.mode, alone.served
        place: dict[str, Any] = {"factors": alone.factors.sha, "rank": alone.rank}
    else:
        error = done.errors_on_bases[adapter_id]
        cluster, slot = assembled.slots[adapter_id]
        mode, served = "core", assembled.clusters[cluster].served[slot]
        place = {"cluster": str(cluster), "slot": slot}
    return Adapter(
        version=record.version,
        etag=record.etag,
        mode=mode,
        served=served,
        error=error.error,
        error_unweighted=error.unweighted,
        error_worst_module=error.worst_module,
        **brought_fields(record),
        **place,
    )


def summary_of(done: Compressed, manifest: Manifest, costs: Costs) -> Summary:
    modes = [adapter.mode for adapter in manifest.adapters.values()]
    fitted_ids, clustered, chosen = done.fitted.adapter_ids, done.clustered, done.chosen
    compared = [adapter_id for adapter_id in fitted_ids if adapter_id in manifest.adapters]
    on_bases = {i: error for i, error in done.errors_on_bases.items() if i in manifest.adapters}
    served = compared or [
        adapter_id for adapter_id, adapter in manifest.adapters.items() if adapter.mode == "truncated"
    ]
    measured = [fitted_ids[i] for i in clustered.measured] if clustered else []
    sampled, at_random = (clustered.errors, clustered.random_errors) if clustered else ([], [])
    return Summary(
        bundle=manifest.bundle,
        num_adapters=len(manifest.adapters),
        num_on_basis=modes.count("core"),
        num_truncated=modes.count("truncated"),
        num_raw=modes.count("raw"),
        num_refused=len(manifest.refused),
        cluster_sizes={name: cluster.num_slots for name, cluster in manifest.clusters.items()},
        num_modules=len(manifest.modules),
        bytes_before=sum(done.collection.records[adapter_id].size_bytes for adapter_id in manifest.adapters),
        bytes_after=manifest.resident_bytes(),
        num_fitted=len(compared),
        num_fitted_alone=sum(manifest.adapters[adapter_id].mode != "core" for adapter_id in compared),
        num_dissolved=len(done.grades.dissolved),
        bytes_alone=sum(manifest.objects[str(a.factors)] for i in compared if (a := manifest.adapters[i]).factors),
        alternatives=asdict(done.alternatives) if done.alternatives else None,
        served=ErrorFigure.of({adapter_id: manifest.adapters[adapter_id].error for adapter_id in served}),
        on_basis=ErrorFigure.of({adapter_id: on_bases[adapter_id].error for adapter_id in compared}),
        clustering=ErrorFigure.of(dict(zip(measured, sampled, strict=True))),
        random_split=ErrorFigure.of(dict(zip(measured, at_random, strict=True))),
        num_estimated=len(measured),
        svd_equal_bytes=ErrorFigure.of(_svd_errors(done, manifest, compared)),
        clustering_start=clustered.start if clustered else "",
        similarity=_similarity(clustered, manifest) if clustered else None,
        module_errors=_module_errors(done),
        gate=asdict(done.gate) if done.gate.evidence else None,
        target_error=done.asked.target_error or None,
        choices=[
            {**asdict(choice), "confirmed_error": chosen.confirmed.get(choice), "chosen": chosen.is_taken(choice)}
            for choice in chosen.weighed
        ],
        tradeoff=_tradeoff(done, on_bases),
        seconds=dict(costs.seconds),
        bytes_read=costs.bytes_read,
        peak_task_memory_bytes=done.fitted.peak_memory_bytes,
    )


def _similarity(clustered: Clustered, manifest: Manifest) -> list[list[float]] | None:
    """Of the clusters that somebody is served from, in the order of their numbers."""
    left = sorted(map(int, manifest.clusters))
    return [[clustered.similarity[i][j] for j in left] for i in left] or None if clustered.similarity else None


def _module_errors(done: Compressed) -> dict[str, float]:
    """Module -> mean squared relative error, on their bases, of the adapters that touch it."""
    records = done.collection.records
    figures = {}
    for module, errors in done.fitted.squared_errors.items():
        relative = [
            error / places.energy
            for adapter_id, error in zip(done.fitted.adapter_ids, errors, strict=True)
            if adapter_id in records
            and (places := records[adapter_id].modules.get(module)) is not None
            and places.energy > 0
        ]
        if relative:
            figures[module] = math.fsum(relative) / len(relative)
    return figures


def _tradeoff(done: Compressed, on_bases: Mapping[str, AdapterError]) -> list[dict[str, Any]]:
    """Bytes against error: SVD at every rank, what was weighed, and what was fitted."""
    context, chosen = done.chosen.context, done.chosen
    compared = {i: record for i, record in done.collection.records.items() if not done.asked.is_raw(i)}
    if not compared:
        return []
    shape = collection_shape(context, list(compared.values()))
    spectra = [list(done.collection.spectra[adapter_id].values()) for adapter_id in compared]
    points = choose_svd(shape, spectra, 0.0)
    points += [choice for choice in chosen.weighed if choice.method != "svd"]
    if on_bases:
        options = context.options
        fitted = collection_shape(context, list(chosen.records.values()))
        size = fitted.joint_bytes(np.asarray(done.fitted.labels), int(options.rank), options.method == "jd-diag")
        error = math.fsum(found.error for found in on_bases.values()) / len(on_bases)
        points.append(Choice(options.method, int(options.clusters), int(options.rank), size, error))
    return [
        {"method": c.method, "clusters": c.clusters, "rank": c.rank, "bytes": c.size_bytes, "error": c.error}
        for c in points
    ]


def _svd_errors(done: Compressed, manifest: Manifest, compared: list[str]) -> dict[str, float]:
    """The compared adapters by plain SVD, in the bytes that they take in the bundle."""
    if not compared:
        return {}
    budget = manifest.resident_bytes() - sum(
        manifest.objects[str(adapter.factors)]
        for adapter_id, adapter in manifest.adapters.items()
        if adapter.factors and adapter_id not in compared
    )
    spectra = {
        adapter_id: {module: np.asarray(values) for module, values in done.collection.spectra[adapter_id].items()}
        for adapter_id in compared
    }
    itemsize = done.chosen.context.dtype.itemsize
    component_bytes = {module: (shape.d_out + shape.d_in) * itemsize for module, shape in manifest.modules.items()}
    return errors_at_equal_bytes(spectra, component_bytes, budget)
