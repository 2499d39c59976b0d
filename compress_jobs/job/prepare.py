"""Before Ray is asked for anything: all that can be wrong outside is looked at, within half a minute."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.adapters.base import read_base
from cluster.adapters.listing import list_adapters
from cluster.adapters.record import AdapterFiles
from cluster.bundle.revisions import read_current
from cluster.compression.sample import sample_modules
from cluster.errors import ConfigError, StoreMissing
from cluster.store.protocol import Store
from compress_jobs.job import tasks
from compress_jobs.job.context import JobContext, job_id
from compress_jobs.job.options import RunOptions
from compress_jobs.progress import say

# A few modules of every kind, and fewer where there are so many adapters that a sample is large.
_SAMPLED_PER_KIND, _SAMPLED_OF_MANY, _MANY = 3, 1, 256


@dataclass(frozen=True)
class Job:
    """A run that can begin. ``context`` has the options as they were asked; ``seen_current`` is CURRENT's ETag, None
    where nothing is published."""

    context: JobContext
    store: Store
    folders: list[AdapterFiles]
    seen_current: str | None

    @property
    def asked(self) -> RunOptions:
        return self.context.options

    @property
    def in_flight(self) -> int:
        """Ray tasks that run at once. Ray must be connected."""
        return self.asked.in_flight or tasks.default_in_flight()


def prepare(options: RunOptions) -> Job:
    """Reads the base and the collection's listing, and probes the store that will be published on. Raises CtsError."""
    base = read_base(options.base, name=options.base_name or None, accept=options.accept_base)
    context = JobContext("", options, base, ())
    store = context.out()
    # Before hours are spent: may this store be published on at all?
    store.check_conditional_writes()
    current = read_current(store)
    folders = _list_folders(context)
    say(f"{len(folders)} adapters in {options.adapters}")
    per_kind = _SAMPLED_PER_KIND if len(folders) < _MANY else _SAMPLED_OF_MANY
    sampled = tuple(sample_modules(list(base.modules), per_kind))
    context = replace(context, job_id=job_id(options, base, folders), sampled=sampled)
    return Job(context, store, folders, current[1] if current else None)


def _list_folders(context: JobContext) -> list[AdapterFiles]:
    options = context.options
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
    return folders
