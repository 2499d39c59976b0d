"""The automatic choice: weighed on the sample by Ray tasks, confirmed on all modules after the fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster.compression.choose import Choice, CollectionShape, best_choice, choose_svd, cluster_counts
from cluster.compression.sample import kind_energies
from cluster.errors import ConfigError
from compress_jobs.job import tasks
from compress_jobs.job.options import AUTO
from compress_jobs.job.state import Job
from compress_jobs.progress import say


def choose(job: Job) -> None:
    """Weigh what is left to choose and take the best. Raises ConfigError where nothing meets the target."""
    asked = job.asked
    target = asked.target_error
    shape = collection_shape(job, job.fitted)
    ranks = int(shape.ranks.max())
    best_bytes = int(shape.ranks.sum(0) @ shape.sides.sum(1)) * shape.itemsize  # of the whole factors
    if asked.method in (AUTO, "svd"):
        spectra = [list(job.spectra[adapter_id].values()) for adapter_id in job.fitted]
        job.weighed += [c for c in choose_svd(shape, spectra, target) if asked.rank in (AUTO, c.rank)]
    counts = cluster_counts(len(job.fitted)) if asked.clusters == AUTO else [min(int(asked.clusters), len(job.fitted))]
    largest = int(shape.ranks.sum(0).max())
    ranks_tried = range(1, largest + 1) if asked.rank == AUTO else range(int(asked.rank), int(asked.rank) + 1)
    energies = kind_energies([job.records_read[adapter_id] for adapter_id in job.fitted])
    for method in ("jd-full", "jd-diag") if asked.method == AUTO else (asked.method,):
        if method == "svd":
            continue
        best = best_choice(job.weighed, target)
        limit = best.size_bytes if best else best_bytes
        calls = [(job.context, job.fitted, energies, shape, method, k, ranks_tried, limit) for k in counts]
        for _, choices in tasks.run_bounded(tasks.weigh_task, calls, job.in_flight):
            job.weighed += choices
    job.weighed.sort(key=lambda choice: (choice.method, choice.clusters, choice.rank))
    say_weighed(job)
    best = best_choice(job.weighed, target)
    if best is None:
        nearest = min(job.weighed, key=lambda choice: choice.error, default=None)
        seen = f"; the nearest is {_name(nearest)} with {nearest.error:.4f}" if nearest else ""
        raise ConfigError(
            f"--target-error {target}: nothing that was weighed meets it in fewer than the {best_bytes:,} bytes of the "
            f"adapters themselves (rank {ranks}){seen}; raise the target, or serve them whole with --raw '*'"
        )
    take(job, best)


def confirm(job: Job) -> bool:
    """Whether the fit of all modules meets the target; where it does not, the next best choice is taken instead."""
    errors = [found.error for found in job.basis_errors().values()]
    if not job.asked.auto or not errors:
        return True
    target = job.asked.target_error
    error = float(np.mean(errors))
    now = next(choice for choice in job.weighed if is_chosen(choice, job))
    job.confirmed[now] = error
    if error <= target:
        say(f"confirmed on all modules: {_name(now)} has a mean error of {error:.4f}, target {target}")
        return True
    say(f"not confirmed: {_name(now)} has a mean error of {error:.4f} on all modules, target {target}")
    if job.asked.rank == AUTO:
        # Where the sample was too hopeful, the smallest step up is surely worth weighing.
        size = collection_shape(job, job.fitted).joint_bytes(job.labels, now.rank + 1, now.method == "jd-diag")
        step_up = Choice(now.method, now.clusters, now.rank + 1, size, 0.999 * now.error * target / error)
        if not any((c.method, c.clusters, c.rank) == (now.method, now.clusters, now.rank + 1) for c in job.weighed):
            job.weighed.append(step_up)
    hope = error / now.error  # how far the sample's errors fall short; SVD's are exact
    left = [
        choice if choice.method == "svd" else replace(choice, error=choice.error * hope)
        for choice in job.weighed
        if choice not in job.confirmed
    ]
    best = best_choice(left, target)
    if best is None:
        raise ConfigError(
            f"--target-error {target}: {_name(now)} met it on the sample but has {error:.4f} on all modules, and "
            "nothing else that was weighed meets it; raise the target, or let more be chosen (--rank auto)"
        )
    take(job, next(c for c in job.weighed if (c.method, c.clusters, c.rank) == (best.method, best.clusters, best.rank)))
    return False


def take(job: Job, choice: Choice) -> None:
    say(f"chosen: {_name(choice)}, {choice.size_bytes:,} bytes resident, error {choice.error:.4f}")
    options = job.asked.with_choice(choice.method, choice.clusters, choice.rank)
    job.context = replace(job.context, options=options)
    if choice.method == "svd":
        job.fitted, job.fits, job.clustered = [], [], None


def collection_shape(job: Job, adapter_ids: list[str]) -> CollectionShape:
    records = [job.records_read[adapter_id] for adapter_id in adapter_ids]
    return CollectionShape.of(records, job.context.base.modules, job.context.dtype.itemsize)


def say_weighed(job: Job) -> None:
    for choice in job.weighed:
        meets = "meets" if best_choice([choice], job.asked.target_error) else "-"
        say(f"weighed  {_name(choice):<34} {choice.size_bytes:>15,} bytes  error {choice.error:7.4f}  {meets}")


def is_chosen(choice: Choice, job: Job) -> bool:
    options = job.context.options
    clusters = choice.clusters if choice.method == "svd" else int(options.clusters)
    return (choice.method, choice.clusters, choice.rank) == (options.method, clusters, options.rank)


def _name(choice: Choice) -> str:
    clusters = "" if choice.method == "svd" else f", {choice.clusters} clusters"
    return f"{choice.method}{clusters}, rank {choice.rank}"
