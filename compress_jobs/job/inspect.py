"""Pass 1: every adapter read whole, refused or accepted, measured, and a sample of it kept for clustering."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from cluster.adapters.factors import Factors
from cluster.adapters.reading import read_adapter
from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.bundle.manifest import Refused
from cluster.compression.sample import sample_modules
from cluster.compression.svd import adapter_spectra
from cluster.errors import AdapterRefused, ConfigError, StoreForbidden, StoreMissing
from compress_jobs.job import tasks
from compress_jobs.job.context import JobContext
from compress_jobs.job.parts import once, tensors_stand, write_tensors
from compress_jobs.job.prepare import Job
from compress_jobs.progress import say, track
from compress_jobs.report.refusals import counts, refusal_lines, remedy_lines

# Of the store's making, not the adapter's: tried again by a job that goes on.
_UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Inspected:
    """``record`` or ``refused``, never both. ``spectra``: module -> squared singular values, descending."""

    adapter_id: str
    record: AdapterRecord | None = None
    refused: Refused | None = None
    spectra: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Collection:
    """``records`` of the accepted adapters, by id in order; what was refused; and the ``spectra`` of the accepted:
    id -> module -> squared singular values, descending."""

    records: dict[str, AdapterRecord]
    refused: dict[str, Refused]
    spectra: dict[str, dict[str, list[float]]]

    @property
    def bytes_read(self) -> int:
        return sum(record.size_bytes for record in self.records.values())

    def without_changed(self, changed: Mapping[str, str]) -> Collection:
        """``changed``: id -> how its file was found to be another than the one inspected. These are refused now."""
        new = {adapter_id: message for adapter_id, message in changed.items() if adapter_id in self.records}
        for adapter_id, message in new.items():
            say(f"refused {adapter_id} (changed): {message}")
        return replace(
            self,
            records={adapter_id: record for adapter_id, record in self.records.items() if adapter_id not in new},
            refused=self.refused | {adapter_id: Refused("changed", message) for adapter_id, message in new.items()},
        )


def inspect_all(job: Job) -> Collection:
    """Raises ConfigError when no adapter can be accepted, or a ``--raw`` pattern matches none of them."""
    calls = [(job.context, files) for files in job.folders]
    results = tasks.run_bounded(tasks.remote(inspect_adapter), calls, job.in_flight)
    found = sorted((result for _, result in track(results, len(calls), "inspect")), key=lambda found: found.adapter_id)
    collection = Collection(
        {one.adapter_id: one.record for one in found if one.record is not None},
        {one.adapter_id: one.refused for one in found if one.refused is not None},
        {one.adapter_id: one.spectra for one in found if one.record is not None},
    )
    if collection.refused:
        say(f"refused {len(collection.refused)} of {len(calls)} adapters: {counts(collection.refused)}")
    if not collection.records:
        say(*refusal_lines(collection.refused), *remedy_lines(collection.refused))
        raise ConfigError(
            f"--adapters {job.asked.adapters}: none of the {len(calls)} adapters can be accepted; see above"
        )
    for pattern in job.asked.raw:
        if not fnmatch.filter(collection.records, pattern):
            raise ConfigError(
                f"--raw {pattern}: matches none of the accepted adapters; give an id, or a pattern with *"
            )
    return collection


def inspect_adapter(context: JobContext, files: AdapterFiles) -> Inspected:
    """Raises StoreError only, when the store itself fails: whatever is wrong with one adapter is that adapter's own."""
    # By hash: an id that will be refused may be no key of a store.
    name = hashlib.sha256(files.adapter_id.encode()).hexdigest()[:32]

    def stands(found: Inspected) -> bool:
        if found.refused is not None:
            return found.refused.reason != _UNREADABLE
        return not _has_sample(context, found.adapter_id) or tensors_stand(
            context, [context.sample_key(found.adapter_id)]
        )

    return once(context, f"inspected/{name}", Inspected, lambda: _inspect(context, files), stands)


def _inspect(context: JobContext, files: AdapterFiles) -> Inspected:
    try:
        record, factors = read_adapter(context.adapters(), files, context.base)
    except AdapterRefused as refused:
        return Inspected(files.adapter_id, refused=Refused(refused.reason, refused.message))
    except (StoreForbidden, StoreMissing) as error:
        return Inspected(files.adapter_id, refused=Refused(_UNREADABLE, str(error)))
    if _has_sample(context, files.adapter_id):
        write_tensors(context, context.sample_key(files.adapter_id), _sample(context, factors))
    return Inspected(files.adapter_id, record, spectra=adapter_spectra(factors))


def _has_sample(context: JobContext, adapter_id: str) -> bool:
    return context.options.needs_sample and not context.options.is_raw(adapter_id)


def _sample(context: JobContext, factors: dict[str, Factors]) -> dict[str, torch.Tensor]:
    touched = {module for module, (_, B) in factors.items() if B.any()}
    sampled = touched.intersection(context.sampled) or set(
        sample_modules([module for module in factors if module in touched])
    )
    tensors = {}
    for module in sampled:
        A, B = factors[module]
        # bfloat16 is enough to tell which adapters belong together.
        tensors[f"{module}.A"], tensors[f"{module}.B"] = A.to(torch.bfloat16), B.to(torch.bfloat16)
    return tensors
