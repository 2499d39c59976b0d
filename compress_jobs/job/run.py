"""The main job: list, inspect, choose, cluster, fit, confirm, grade, assemble, publish.

The driver sees figures and hashes; nothing of the collection's tensors passes through it. Every step leaves a
part in ``work/`` (see parts.py): a job that was killed goes on from there when it is started again.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from cluster.bundle.manifest import Manifest, Method
from cluster.bundle.publish import missing_objects, publish
from cluster.bundle.removed import forget_removed
from cluster.bundle.revisions import read_current, read_manifest
from cluster.errors import BundleError, CtsError, InputError, PublishConflict, StoreMissing
from compress_jobs.job.alternatives import alternatives
from compress_jobs.job.assemble import assemble_all
from compress_jobs.job.choose import as_asked, choose, confirm_or_take_next
from compress_jobs.job.cluster import cluster_all
from compress_jobs.job.costs import Costs
from compress_jobs.job.drops import check_drops, check_refusals, check_restored
from compress_jobs.job.finish import complete_page, unfinished
from compress_jobs.job.fit import fit_all
from compress_jobs.job.gate import settle_gate
from compress_jobs.job.grade import grade
from compress_jobs.job.inspect import Collection, inspect_all
from compress_jobs.job.options import AUTO
from compress_jobs.job.prepare import Job
from compress_jobs.job.ray_cluster import check_shared
from compress_jobs.job.write_up import Compressed, manifest_of, summary_of
from compress_jobs.progress import say
from compress_jobs.report.summary import Summary


@dataclass(frozen=True)
class Outcome:
    """``summary`` is None when the run found its bundle published already; ``unfinished`` tells what could not be
    written after that."""

    manifest: Manifest
    summary: Summary | None
    unfinished: str | None = None


def run(job: Job) -> Outcome:
    """Compress the collection and publish it. Ray must be connected.

    Raises CtsError; then nothing new is visible in the store.
    """
    check_shared(job.asked, job.store, job.folders[0], job.relative)
    if parts := sum(1 for _ in job.store.list(job.context.work)):
        say(f"going on with job {job.context.job_id}, which was stopped: {parts} of its files are there")
    try:
        outcome = _run(job)
    except (InputError, PublishConflict):
        _clean_up(job)  # started again it would end the same way
        raise
    _clean_up(job)
    return replace(outcome, unfinished=_finish(job, outcome))


def _finish(job: Job, outcome: Outcome) -> str | None:
    manifest, summary = outcome.manifest, outcome.summary
    served_again = {i: when for i, when in job.notes.items() if i in manifest.adapters}
    if summary:
        # Notes of who is served are not looked at: one that cannot be taken back harms nobody. Not by a run that has
        # published nothing, for a `remove` may have written one just before it publishes.
        with suppress(CtsError):
            forget_removed(job.store, served_again)
    return unfinished(lambda: complete_page(job.store, manifest, asdict(summary) if summary else None))


def _run(job: Job) -> Outcome:
    costs = Costs()
    with costs.phase("inspect"):
        collection = inspect_all(job)
    check_restored(job.asked, collection.refused)
    if (published := _already_published(job, collection)) is not None:
        _say_unrecorded(job, published)
        return Outcome(published, None)
    costs.bytes_read += collection.bytes_read
    if not job.served:
        check_refusals(job.asked, collection.refused, len(job.folders))
    check_drops(job.asked, job.served, job.with_folder, collection.records.keys(), collection.refused)
    try:
        chosen = as_asked(job, collection)
        if job.asked.auto and chosen.records:
            with costs.phase("choose"):
                chosen = choose(job, collection, chosen)
        stands = False
        while not stands:
            with costs.phase("cluster"):
                clustered = cluster_all(job, chosen)
            with costs.phase("fit"):
                fitted = fit_all(job, chosen, clustered)
            costs.bytes_read += fitted.bytes_read
            collection = collection.without_changed(fitted.changed)
            errors = fitted.errors(collection.records)
            chosen, stands = confirm_or_take_next(job, chosen, fitted.labels, errors)
        with costs.phase("gate"):
            gate = settle_gate(job, chosen, fitted, errors, collection)
            chosen = chosen.with_gate(gate.gate)
        with costs.phase("assemble"):
            grades = grade(chosen, fitted, errors, collection, gate.gate)
            others = alternatives(job, chosen, fitted, errors, grades)
            assembled = assemble_all(job, chosen, fitted, grades, collection.records)
        costs.bytes_read += assembled.bytes_read
        collection = collection.without_changed(assembled.changed)
        if not collection.records:
            raise BundleError("every adapter changed during the job; nothing is left to publish, run it again")
        check_drops(job.asked, job.served, job.with_folder, collection.records.keys(), collection.refused)
        compressed = Compressed(job, collection, chosen, clustered, fitted, errors, gate, grades, assembled, others)
        return _publish(job, compressed, costs)
    except StoreMissing:
        # A twin with the same inputs was faster, and has tidied up; what this one left since goes the same way.
        if (published := _already_published(job, collection)) is None:
            raise
        return Outcome(published, None)


def _publish(job: Job, done: Compressed, costs: Costs) -> Outcome:
    manifest = manifest_of(done)
    summary = summary_of(done, manifest, costs)
    return Outcome(publish(job.store, manifest, summary.to_json(), job.seen_current), summary)


def _say_unrecorded(job: Job, published: Manifest) -> None:
    recorded = {published.base.name, *published.base.accepted}
    for name in sorted(job.context.base.accepted_names - recorded - {""}):
        say(f"--accept-base {name} is not recorded, for nothing has changed: give it to `add` too")
    if published.method.evidence == "paper":
        say("its gate is the paper's, for nothing could be judged then; --tasks, or another --keep, judges anew")
    if job.asked.layout != published.layout:
        say("--id-pattern and --checkpoints are not recorded, for nothing has changed: give them to `add` too")


def _already_published(job: Job, collection: Collection) -> Manifest | None:
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
        and (manifest.base.name, manifest.base.fingerprint) == (base.name, base.fingerprint)
        and method == _recorded_like(job, method)
        and {adapter_id: adapter.version for adapter_id, adapter in manifest.adapters.items()}
        == {adapter_id: record.version for adapter_id, record in collection.records.items()}
        and manifest.refused == collection.refused
    )
    return manifest if same and not missing_objects(job.store, manifest) else None


def _recorded_like(job: Job, method: Method) -> Method:
    """What these options would record if they chose what ``method`` has."""
    asked, evidence = job.asked, None
    gate = method.gate if asked.gate == AUTO else float(asked.gate)
    if asked.gate == AUTO:
        without_rows = "paper" if method.evidence == "paper" else "probe"
        evidence = "loss" if job.tasks else without_rows
    name = method.name if asked.method == AUTO else asked.method
    clusters = method.clusters if asked.clusters == AUTO else int(asked.clusters)
    rank = method.rank if asked.rank == AUTO else int(asked.rank)
    return asked.recorded_method(name, clusters, rank, gate, evidence, job.tasks)


def _clean_up(job: Job) -> None:
    """Parts are worth nothing once the job is over; failing to remove them must not hide how it ended."""
    try:
        for entry in list(job.store.list(job.context.work)):
            job.store.delete(entry.key)
    except CtsError as error:
        say(f"could not clean up {job.store.uri}/{job.context.work}: {error}")
