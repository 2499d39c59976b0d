"""What a run publishes and tells: its manifest, and the summary that becomes report.json."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.bundle.manifest import Adapter, Base, Cluster, Manifest
from cluster.compression.choose import Choice, choose_svd
from cluster.compression.svd import errors_at_equal_bytes
from compress_jobs.job.choose import collection_shape, is_chosen
from compress_jobs.job.state import AdapterError, Job
from compress_jobs.report.summary import ErrorFigure, Summary


def manifest_of(job: Job) -> Manifest:
    """Named by its content; its objects are stored already."""
    basis_errors = job.basis_errors()
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
    base, options = job.context.base, job.context.options
    touched = {module for record in job.records.values() for module in record.modules}
    return Manifest(
        bundle="",
        revision=0,
        parent=None,
        base=Base(base.name, base.fingerprint),
        method=job.asked.recorded_method(options.method, int(options.clusters), int(options.rank)),
        modules={module: shape for module, shape in base.modules.items() if module in touched},
        clusters={
            str(cluster): Cluster(result.basis.sha, result.cores.sha, len(result.served))
            for cluster, result in sorted(job.assembled.items())
        },
        adapters=adapters,
        refused=dict(sorted(job.refused.items())),
        objects={item.sha: item.size_bytes for item in stored},
    ).with_own_id()


def summary_of(job: Job, manifest: Manifest) -> Summary:
    modes = [adapter.mode for adapter in manifest.adapters.values()]
    compared = [adapter_id for adapter_id in job.fitted if adapter_id in manifest.adapters]
    on_basis = job.basis_errors()
    served = compared or [
        adapter_id for adapter_id, adapter in manifest.adapters.items() if adapter.mode == "truncated"
    ]
    clustered = job.clustered
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
        clustering=ErrorFigure.of(dict(zip(job.fitted, clustered.errors, strict=False))) if clustered else None,
        random_split=ErrorFigure.of(dict(zip(job.fitted, clustered.random_errors, strict=False)))
        if clustered
        else None,
        svd_equal_bytes=ErrorFigure.of(_svd_errors(job, manifest, compared)),
        clustering_start=clustered.start if clustered else "",
        similarity=(clustered.similarity or None) if clustered else None,
        module_errors=_module_errors(job),
        target_error=job.asked.target_error or None,
        choices=[
            {**asdict(choice), "confirmed_error": job.confirmed.get(choice), "chosen": is_chosen(choice, job)}
            for choice in job.weighed
        ],
        tradeoff=_tradeoff(job, on_basis),
        seconds=dict(job.seconds),
        bytes_read=job.num_bytes_read,
        peak_task_memory_bytes=max((fit.peak_memory_bytes for fit in job.fits), default=0),
    )


def _module_errors(job: Job) -> dict[str, float]:
    """Module -> mean squared relative error, on their bases, of the adapters that touch it."""
    figures = {}
    for fit in job.fits:
        for module, errors in fit.squared_errors.items():
            relative = [
                errors[i] / places.energy
                for i, adapter_id in enumerate(job.fitted)
                if adapter_id in job.records
                and (places := job.records[adapter_id].modules.get(module)) is not None
                and places.energy > 0
            ]
            if relative:
                figures[module] = math.fsum(relative) / len(relative)
    return figures


def _tradeoff(job: Job, on_basis: dict[str, AdapterError]) -> list[dict[str, Any]]:
    """Bytes against error: SVD at every rank, what was weighed, and what was fitted."""
    compared = [adapter_id for adapter_id in job.records if not job.asked.is_raw(adapter_id)]
    if not compared:
        return []
    shape = collection_shape(job, compared)
    points = choose_svd(shape, [list(job.spectra[adapter_id].values()) for adapter_id in compared], 0.0)
    points += [choice for choice in job.weighed if choice.method != "svd"]
    if on_basis:
        options = job.context.options
        size = collection_shape(job, job.fitted).joint_bytes(job.labels, int(options.rank), options.method == "jd-diag")
        error = math.fsum(found.error for found in on_basis.values()) / len(on_basis)
        points.append(Choice(options.method, int(options.clusters), int(options.rank), size, error))
    return [
        {"method": c.method, "clusters": c.clusters, "rank": c.rank, "bytes": c.size_bytes, "error": c.error}
        for c in points
    ]


def _svd_errors(job: Job, manifest: Manifest, compared: list[str]) -> dict[str, float]:
    """The compared adapters by plain SVD, in the bytes that they take in the bundle."""
    if not compared:
        return {}
    budget = manifest.resident_bytes() - sum(
        manifest.objects[str(adapter.factors)]
        for adapter_id, adapter in manifest.adapters.items()
        if adapter.factors and adapter_id not in compared
    )
    spectra = {
        adapter_id: {module: np.asarray(values) for module, values in job.spectra[adapter_id].items()}
        for adapter_id in compared
    }
    itemsize = job.context.dtype.itemsize
    component_bytes = {module: (shape.d_out + shape.d_in) * itemsize for module, shape in manifest.modules.items()}
    return errors_at_equal_bytes(spectra, component_bytes, budget)
