"""The gate, where none was given: the largest that keeps what is asked for, by the best evidence at hand.

With held-out rows (``--tasks``): the share kept of the loss that a sample of adapters gains. Without them, where the
base model can be loaded: the same on text of the adapters' own (quality/probe.py). Without either: the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.adapters.record import AdapterRecord
from cluster.errors import ConfigError
from compress_jobs.job import tasks
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.choose import Chosen
from compress_jobs.job.examine import Examined, Subject, examine
from compress_jobs.job.fit import Fitted
from compress_jobs.job.inspect import Collection
from compress_jobs.job.options import AUTO
from compress_jobs.job.prepare import Job
from compress_jobs.progress import say, track
from compress_jobs.quality.gate_choice import NUM_SAMPLED, PAPER, Judged, Level, choose_gate

_PROCESS_BYTES = 1 << 30  # torch, transformers, one adapter, and what a pass through the model holds


@dataclass(frozen=True)
class Gate:
    """``gate``: what was settled on, by ``evidence`` as in ``Method``. ``reason``: why there is none, where the gate is
    the paper's; ``cpu_seconds``: what the evidence took."""

    gate: float
    evidence: str | None = None
    keep: float | None = None
    levels: tuple[Level, ...] = ()
    judged: tuple[Judged, ...] = ()
    reason: str = ""
    cpu_seconds: float = 0.0


def settle_gate(
    job: Job, chosen: Chosen, fitted: Fitted, errors: Mapping[str, AdapterError], collection: Collection
) -> Gate:
    """Raises ConfigError where held-out rows were given and the base cannot be loaded."""
    asked = job.asked
    if asked.gate != AUTO:
        return Gate(float(asked.gate))
    subjects = _sample(job, chosen, fitted, errors, collection)
    evidence = "loss" if job.held_out else "probe"
    if not subjects:
        return _papers(asked.keep, "every adapter is served whole")
    needed = _PROCESS_BYTES + 2 * job.context.base.size_bytes  # stored in 16 bits, computed in 32
    largest = tasks.largest_node_memory()
    if needed > largest:
        return _or_error(
            job,
            f"the base takes {needed >> 20} MiB to run, the largest node of this Ray cluster offers {largest >> 20}",
        )
    num_tasks = min(len(subjects), tasks.num_cpus())
    say(
        f"gate: {len(subjects)} adapters are judged, in {num_tasks} tasks that load the base (up to {needed >> 20} MiB "
        "each); --gate E would spare that"
    )
    calls = [(chosen.context, fitted.num_layers, subjects[i::num_tasks]) for i in range(num_tasks)]
    task = tasks.remote(examine).options(memory=needed)
    done: list[Examined] = []
    results = (one for _, found in tasks.run_bounded(task, calls, num_tasks) for one in found)
    for one in track(results, len(subjects), f"gate, by {'held-out rows' if job.held_out else 'a probe'}"):
        done.append(one)
    failed = [one.failed for one in sorted(done, key=lambda one: (one.is_loaded, one.failed)) if one.failed]
    if not all(one.is_loaded for one in done):
        return _or_error(job, failed[0])
    say(*(f"not judged: {reason}" for reason in failed))
    judged = sorted((one.judged for one in done if one.judged), key=lambda one: one.adapter_id)
    if not judged:
        reason = f"none of the {len(subjects)} sampled adapters changes what the base answers there"
        return _or_error(job, failed[0] if failed else reason)
    num_adapters = sum(not asked.is_raw(adapter_id) for adapter_id in collection.records)
    level, found = choose_gate(judged, [error.error for error in errors.values()], asked.keep, num_adapters)
    say(f"gate {level.gate:g}: {len(judged)} sampled adapters keep {level.kept:.3f} there, {asked.keep:g} is asked for")
    spent = math.fsum(one.cpu_seconds for one in done)
    return Gate(level.gate, evidence, asked.keep, tuple(found), tuple(judged), cpu_seconds=spent)


def _or_error(job: Job, reason: str) -> Gate:
    if job.held_out:
        raise ConfigError(
            f"--tasks {job.asked.tasks}: the gate cannot be judged by it: {reason}; leave --tasks out, or give --gate"
        )
    return _papers(job.asked.keep, reason)


def _papers(keep: float, reason: str) -> Gate:
    say(f"gate {PAPER:g}, the paper's, for there is no evidence of this collection: {reason}")
    return Gate(PAPER, "paper", keep, reason=reason)


def _sample(
    job: Job, chosen: Chosen, fitted: Fitted, errors: Mapping[str, AdapterError], collection: Collection
) -> list[Subject]:
    """From the best held on their bases to the worst, evenly; where there are no bases, from the nearest to rank 1."""
    candidates = [i for i in collection.records if not job.asked.is_raw(i) and (not job.held_out or i in job.held_out)]

    def difficulty(adapter_id: str) -> tuple[float, str]:
        if adapter_id in errors:
            return errors[adapter_id].error, adapter_id
        own = collection.spectra[adapter_id].values()
        return 1 - math.fsum(values[0] for values in own) / math.fsum(map(math.fsum, own)), adapter_id

    candidates.sort(key=difficulty)
    places = np.linspace(0, len(candidates) - 1, min(NUM_SAMPLED, len(candidates))).round().astype(int)
    return [_subject(job, fitted, errors, collection.records[candidates[i]]) for i in places]


def _subject(job: Job, fitted: Fitted, errors: Mapping[str, AdapterError], record: AdapterRecord) -> Subject:
    adapter_id = record.adapter_id
    task = job.held_out.get(adapter_id)
    if adapter_id not in errors:
        return Subject(record, None, 1.0, task)
    index = fitted.adapter_ids.index(adapter_id)
    cluster = fitted.labels[index]
    return Subject(record, (cluster, fitted.labels[:index].count(cluster)), errors[adapter_id].error, task)
