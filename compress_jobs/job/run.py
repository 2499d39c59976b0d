"""The main job: list, inspect, choose, cluster, fit, confirm, grade, assemble, publish.

The driver sees figures and hashes; nothing of the collection's tensors passes through it. Every step leaves a
part in ``work/`` (see parts.py): a job that was killed goes on from there when it is started again.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import asdict, dataclass, replace

import numpy as np

from cluster.adapters.base import read_base
from cluster.adapters.listing import list_adapters
from cluster.adapters.record import AdapterRecord
from cluster.bundle.manifest import Base, Manifest, Method, Refused
from cluster.bundle.publish import missing_objects, publish
from cluster.bundle.revisions import read_current, read_manifest, revision_key
from cluster.compression.sample import kind_energies, sample_modules
from cluster.errors import BundleError, ConfigError, CtsError, InputError, PublishConflict, StoreMissing
from compress_jobs.job import tasks
from compress_jobs.job.assemble import Changed
from compress_jobs.job.choose import choose, confirm
from compress_jobs.job.cluster import without_choice
from compress_jobs.job.context import JobContext, job_id
from compress_jobs.job.fit import Layer
from compress_jobs.job.options import AUTO, RunOptions
from compress_jobs.job.state import AdapterError, Job
from compress_jobs.job.write_up import manifest_of, summary_of
from compress_jobs.progress import say, track
from compress_jobs.report.render import render
from compress_jobs.report.summary import Summary

__all__ = ["AdapterError", "Job", "Outcome", "group_by_layer", "prepare", "run"]

_LAYER = re.compile(r"(.*?\.\d+)\.")
# A few modules of every kind, and fewer where there are so many adapters that a sample is large.
_SAMPLED_PER_KIND, _SAMPLED_OF_MANY, _MANY = 3, 1, 256
_PROCESS_BYTES = 600 << 20
# Layers of one task: while one is computed the next is read.
_LAYERS_A_TASK = 4


@dataclass(frozen=True)
class Outcome:
    """``summary`` is None when the run found its bundle published already."""

    manifest: Manifest
    summary: Summary | None


def prepare(options: RunOptions) -> Job:
    """Look at everything from outside that can be wrong before Ray is asked for anything: the base, the
    store that will be published on, the collection. Raises CtsError within half a minute."""
    base = read_base(options.base, name=options.base_name or None, accept=options.accept_base)
    context = JobContext("", options, base, ())
    store = context.out()
    # Before hours are spent: may this store be published on at all?
    store.check_conditional_writes()
    current = read_current(store)
    try:
        folders = list_adapters(context.adapters())
    except StoreMissing as error:
        raise StoreMissing(f"--adapters: {error}") from None
    for adapter_id in options.without:
        if adapter_id not in {files.adapter_id for files in folders}:
            raise ConfigError(f"--without {adapter_id}: no such adapter in {options.adapters}")
    folders = [files for files in folders if files.adapter_id not in options.without]
    if not folders:
        raise ConfigError(f"--adapters {options.adapters}: no adapter there; expected folders with adapter_config.json")
    say(f"{len(folders)} adapters in {options.adapters}")
    per_kind = _SAMPLED_PER_KIND if len(folders) < _MANY else _SAMPLED_OF_MANY
    sampled = tuple(sample_modules(list(base.modules), per_kind))
    context = replace(context, job_id=job_id(options, base, folders), sampled=sampled)
    return Job(context, options, store, folders, seen_current=current[1] if current else None)


def run(job: Job) -> Outcome:
    """Compress the collection and publish it. Ray must be connected.

    Raises CtsError; then nothing new is visible in the store.
    """
    job.in_flight = job.context.options.in_flight or tasks.default_in_flight()
    if parts := sum(1 for _ in job.store.list(job.context.work)):
        say(f"going on with job {job.context.job_id}, which was stopped: {parts} of its files are there")
    try:
        outcome = _run(job)
    except StoreMissing:
        # A twin with the same inputs was faster, and has tidied up; what this one left since goes the same way.
        if (published := _already_published(job)) is None:
            raise
        outcome = Outcome(published, None)
    except (InputError, PublishConflict):
        _clean_up(job)  # started again it would end the same way
        raise
    _clean_up(job)
    return outcome


def _run(job: Job) -> Outcome:
    with job.phase("inspect"):
        _inspect(job)
    if (published := _already_published(job)) is not None:
        return Outcome(published, None)
    if job.asked.auto and job.fitted:
        with job.phase("choose"):
            choose(job)
    while True:
        with job.phase("cluster"):
            _cluster(job)
        with job.phase("fit"):
            _fit(job)
        if confirm(job):
            break
    with job.phase("assemble"):
        _assemble(job)
    manifest = manifest_of(job)
    summary = summary_of(job, manifest)
    manifest = publish(job.store, manifest, summary.to_json(), job.seen_current)
    with job.phase("report"):
        page = render(manifest, asdict(summary))
        job.store.write(revision_key(manifest.bundle, manifest.revision, "report.html"), page.encode())
    return Outcome(manifest, summary)


def _inspect(job: Job) -> None:
    """Pass 1."""
    options = job.context.options
    calls = [(job.context, files) for files in job.folders]
    for _, result in track(tasks.run_bounded(tasks.inspect_task, calls, job.in_flight), len(calls), "inspect"):
        if result.record is not None:
            job.records[result.adapter_id] = result.record
            job.spectra[result.adapter_id] = result.spectra
        else:
            job.refused[result.adapter_id] = result.refused
    job.records = dict(sorted(job.records.items()))
    job.records_read = dict(job.records)
    job.num_bytes_read += sum(record.size_bytes for record in job.records.values())
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
    if options.method != "svd" or options.auto:
        job.fitted = [adapter_id for adapter_id in job.records if not options.is_raw(adapter_id)]


def _already_published(job: Job) -> Manifest | None:
    """The current revision, if it came from a run over these very inputs and options and is whole."""
    current = read_current(job.store)
    if current is None:
        return None
    try:
        manifest = read_manifest(job.store, current[0].bundle, current[0].revision)
    except (StoreMissing, BundleError):
        return None
    base, method = job.context.base, manifest.method
    same = (
        manifest.revision == 0  # later ones hold adapters that no run has fitted
        and manifest.base == Base(base.name, base.fingerprint)
        and method == _recorded_like(job.asked, method)
        and {adapter_id: adapter.version for adapter_id, adapter in manifest.adapters.items()}
        == {adapter_id: record.version for adapter_id, record in job.records.items()}
        and manifest.refused == job.refused
    )
    return manifest if same and not missing_objects(job.store, manifest) else None


def _recorded_like(asked: RunOptions, method: Method) -> Method:
    """What these options would record if they chose what ``method`` has."""
    name = method.name if asked.method == AUTO else asked.method
    clusters = method.clusters if asked.clusters == AUTO else int(asked.clusters)
    return asked.recorded_method(name, clusters, method.rank if asked.rank == AUTO else int(asked.rank))


def _cluster(job: Job) -> None:
    if not job.fitted:
        return
    options = job.context.options
    wanted = int(options.clusters)
    num_clusters = min(wanted, len(job.fitted))
    if num_clusters < wanted:
        say(f"--clusters {wanted} is more than the {len(job.fitted)} adapters to cluster: using {num_clusters}")
    say(f"cluster: {len(job.fitted)} adapters into {num_clusters}")
    if num_clusters == 1:
        job.clustered = without_choice(job.context, job.fitted)
    else:
        job.clustered = tasks.run_one(
            tasks.cluster_task,
            job.context,
            job.fitted,
            num_clusters,
            kind_energies([job.records_read[adapter_id] for adapter_id in job.fitted]),
        )


def _fit(job: Job) -> None:
    """Pass 2."""
    if job.clustered is None:
        return
    records = [job.records_read[adapter_id] for adapter_id in job.fitted]
    job.layers = group_by_layer(
        [module for module in job.context.base.modules if any(module in record.modules for record in records)]
    )
    layers = [
        Layer(number, modules, [_only_modules(record, modules) for record in records])
        for number, modules in enumerate(job.layers)
    ]
    size = max(1, min(_LAYERS_A_TASK, len(layers) // job.in_flight))
    calls = [(job.context, layers[i : i + size], job.clustered.labels) for i in range(0, len(layers), size)]
    task = tasks.fit_task(memory_bytes=_fit_memory(job, layers))
    results = tasks.run_bounded(task, calls, job.in_flight)
    by_layer = ((index * size + i, fit) for index, fits in results for i, fit in enumerate(fits))
    fits = dict(track(by_layer, len(layers), "fit layers"))
    job.fits = [fits[number] for number in range(len(layers))]
    for fit in job.fits:
        job.num_bytes_read += fit.num_bytes_read
        for index, message in fit.changed.items():
            _drop_changed(job, job.fitted[index], message)


def _fit_memory(job: Job, layers: list[Layer]) -> int:
    """What a fit task may hold, in bytes: the process itself, this layer's and the next one's factors in float32,
    and what is stacked of them."""
    modules = job.context.base.modules
    largest = max(
        sum(
            places.rank * (modules[module].d_out + modules[module].d_in)
            for record in layer.records
            for module, places in record.modules.items()
        )
        for layer in layers
    )
    return _PROCESS_BYTES + 3 * 4 * largest


def _assemble(job: Job) -> None:
    """Grade every adapter by the gate, then write each cluster and each adapter that stands alone."""
    options = job.context.options
    basis_errors = job.basis_errors()
    on_basis: dict[int, list[str]] = {}
    alone = []
    for index, adapter_id in enumerate(job.fitted):
        if adapter_id in job.records:
            if basis_errors[adapter_id].error <= options.gate:
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
        if isinstance(result, Changed):
            _drop_changed(job, alone[index], result.message)
        else:
            job.standalone[alone[index]] = result
            job.num_bytes_read += job.records[alone[index]].size_bytes
    if not job.slots and not job.standalone:
        raise BundleError("every adapter changed during the job; nothing is left to publish, run it again")


def _drop_changed(job: Job, adapter_id: str, message: str) -> None:
    if job.records.pop(adapter_id, None) is not None:
        job.slots.pop(adapter_id, None)
        job.refused[adapter_id] = Refused("changed", message)
        say(f"refused {adapter_id} (changed): {message}")


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
