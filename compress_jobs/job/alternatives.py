"""Where many adapters stand alone: which gate, rank or number of clusters would keep them on bases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.compression.balanced import Labels, random_balanced
from cluster.compression.clustering import adapter_errors
from cluster.compression.sample import MANY, kind_energies
from compress_jobs.job import tasks
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.choose import Chosen
from compress_jobs.job.context import JobContext
from compress_jobs.job.fit import Fitted
from compress_jobs.job.grade import Grades
from compress_jobs.job.parts import once
from compress_jobs.job.prepare import Job
from compress_jobs.job.sample import KindEnergies, of_adapters, read_sample

FEW = 0.1  # of those meant for a basis may stand alone without a word
_MOST = 0.9
_TIMES = (2, 4)
_MAX_RANK = 512


@dataclass(frozen=True)
class Alternatives:
    """``gate`` would keep nine in ten of those that were fitted on their bases, at ``error`` in the mean; ``kept``:
    option -> the share that it would keep there at the gate as it is, estimated on the sample."""

    gate: float
    error: float
    kept: dict[str, float]


def alternatives(
    job: Job, chosen: Chosen, fitted: Fitted, errors: Mapping[str, AdapterError], grades: Grades
) -> Alternatives | None:
    """None where no more than a tenth of those that were fitted stand alone."""
    alone = set(grades.alone).intersection(errors)
    if len(alone) <= FEW * len(errors):
        return None
    ordered = sorted(error.error for error in errors.values())
    kept = ordered[: math.ceil(_MOST * len(ordered))]
    kept_by: dict[str, float] = {}
    if job.asked.needs_sample and chosen.records.keys() == set(fitted.adapter_ids):
        some = _some_clusters(fitted.labels)
        ids, labels = [fitted.adapter_ids[i] for i in some], [fitted.labels[i] for i in some]
        energies = of_adapters(kind_energies(list(chosen.records.values())), some)
        total = len(set(fitted.labels))
        kept_by = tasks.run_one(tasks.remote(try_others), chosen.context, ids, labels, energies, total)
    # Rounded up, so that the gate that is printed keeps them.
    return Alternatives(math.ceil(kept[-1] * 1000) / 1000, math.fsum(kept) / len(kept), kept_by)


def _some_clusters(labels: Sequence[int]) -> list[int]:
    """The adapters of the first clusters: all, or as many as stand for the others; of clusters of thousands, which no
    task could hold, some hundreds."""
    sizes = np.cumsum(np.bincount(labels))
    last = int(np.searchsorted(sizes, MANY))
    return [i for i, label in enumerate(labels) if label <= last][: 2 * MANY]


def try_others(
    context: JobContext,
    adapter_ids: Sequence[str],
    labels: Sequence[int],
    energies: KindEnergies,
    total_clusters: int,
) -> dict[str, float]:
    """Option -> share of the adapters that would meet the gate. ``total_clusters``: with those of other adapters."""
    options = context.options

    def step() -> dict[str, float]:
        sample = read_sample(context, adapter_ids, energies)

        def share(tried: Labels, rank: int) -> float:
            met = adapter_errors(sample, tried, rank, options.seed, options.method) <= float(options.gate)
            return float(np.mean(met))

        found = {}
        rank, clusters = int(options.rank), len(set(labels))
        for times in _TIMES:
            if rank * times <= _MAX_RANK:
                found[f"--rank {rank * times}"] = share(np.asarray(labels), rank * times)
        for times in _TIMES:
            if clusters * times <= len(adapter_ids) // 2:
                # At random: a clustering of so many takes longer, and is seldom far better.
                split = random_balanced(len(adapter_ids), clusters * times, np.random.default_rng(options.seed))
                found[f"--clusters {total_clusters * times}"] = share(split, rank)
        return found

    return once(context, f"{context.fits}alternatives-{options.gate}", dict[str, float], step)
