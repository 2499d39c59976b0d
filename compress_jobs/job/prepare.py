"""Before Ray is asked for anything: all that can be wrong outside is looked at, within half a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.adapters.base import read_base
from cluster.adapters.layout import Layout
from cluster.adapters.listing import Listing, list_collection
from cluster.adapters.record import AdapterFiles
from cluster.bundle.removed import read_removed
from cluster.bundle.revisions import Current, read_current, read_manifest
from cluster.compression.sample import MANY, sample_modules
from cluster.errors import BundleError, ConfigError, StoreMissing
from cluster.store.address import open_store
from cluster.store.protocol import Store
from compress_jobs.host.submission import check_place, is_relative
from compress_jobs.job import tasks
from compress_jobs.job.brought import say_untold
from compress_jobs.job.context import JobContext, job_id
from compress_jobs.job.drops import check_drops
from compress_jobs.job.options import RunOptions, matching
from compress_jobs.progress import say
from compress_jobs.quality.gate_choice import NUM_ROWS
from compress_jobs.quality.task import Task, hash_tasks, read_tasks

# A few modules of every kind, and fewer where there are so many adapters that a sample is large.
_SAMPLED_PER_KIND, _SAMPLED_OF_MANY = 3, 1


@dataclass(frozen=True)
class Job:
    """A run that can begin. ``context`` has the options as they were asked; ``seen_current`` is CURRENT's ETag, None
    where nothing is published; ``served`` are the adapters of its revision, ``with_folder`` those of them that have a
    folder still; ``notes`` tell which adapters were removed when, those that are served again among them; ``relative``
    are the options that were given as relative paths; ``held_out``: adapter id -> its rows in the file ``--tasks``,
    ``tasks``: their hash."""

    context: JobContext
    store: Store
    folders: list[AdapterFiles]
    seen_current: str | None
    served: frozenset[str]
    with_folder: frozenset[str]
    notes: dict[str, str]
    relative: tuple[str, ...] = ()
    held_out: Mapping[str, Task] = field(default_factory=dict)
    tasks: str | None = None

    @property
    def asked(self) -> RunOptions:
        return self.context.options

    @property
    def in_flight(self) -> int:
        """Ray tasks that run at once. Ray must be connected."""
        return self.asked.in_flight or tasks.default_in_flight()


def prepare(options: RunOptions) -> Job:
    """Reads the base and the collection's listing, and probes the store that will be published on. Raises CtsError."""
    check_place("--out", options.out)
    places = (("adapters", options.adapters), ("out", options.out))
    relative = tuple(f"--{name} {uri}" for name, uri in places if is_relative(uri))
    # Ray's workers have other working folders.
    adapters, base_folder, out = (open_store(uri).uri for uri in (options.adapters, options.base, options.out))
    options = replace(options, adapters=adapters, base=base_folder, out=out)
    base = read_base(options.base, name=options.base_name or None, accept=options.base_names)
    context = JobContext("", options, base, ())
    store = context.out()
    # Before hours are spent: may this store be published on at all?
    store.check_conditional_writes()
    current = read_current(store)
    served, served_by = _served(store, current[0]) if current else (frozenset(), Layout())
    notes = read_removed(store)
    removed = {adapter_id: when for adapter_id, when in notes.items() if adapter_id not in served}
    listing = list_collection(options.adapters, options.layout, served.union(options.restore))
    with_folder = served.intersection(files.adapter_id for files in listing.adapters)
    with_folder |= served.intersection(map(served_by.id_of, listing.folders))
    folders = _without_removed(options, _taken(options, listing, served, removed), removed, served)
    say(f"{len(folders)} adapters in {options.adapters}")
    say_untold(base, options.base, folders)
    check_drops(options, served, with_folder, {files.adapter_id for files in folders})
    held_out = _held_out(options, folders)
    rows = hash_tasks(held_out) if held_out else None
    per_kind = _SAMPLED_PER_KIND if len(folders) < MANY else _SAMPLED_OF_MANY
    sampled = tuple(sample_modules(list(base.modules), per_kind))
    context = replace(context, job_id=job_id(options, base, folders, rows), sampled=sampled)
    etag = current[1] if current else None
    return Job(context, store, folders, etag, served, with_folder, notes, relative, held_out, rows)


def _held_out(options: RunOptions, folders: Sequence[AdapterFiles]) -> dict[str, Task]:
    """Raises ConfigError where there are none for any adapter of the collection."""
    if not options.tasks:
        return {}
    ids = {files.adapter_id for files in folders}
    found = {name: task for name, task in read_tasks(Path(options.tasks), NUM_ROWS).items() if name in ids}
    if not found:
        raise ConfigError(f"--tasks {options.tasks}: none of the {len(ids)} adapters has a task of its name there")
    return found


def _served(store: Store, current: Current) -> tuple[frozenset[str], Layout]:
    """Ids, and the layout that they have them by. Of a revision that cannot be read nothing is served: a run mends
    that."""
    try:
        manifest = read_manifest(store, current.bundle, current.revision)
        return frozenset(manifest.adapters), manifest.layout
    except (StoreMissing, BundleError) as error:
        say(f"what is served cannot be told, so nothing keeps it from being dropped: {error}")
        return frozenset(), Layout()


def _without_removed(
    options: RunOptions, folders: list[AdapterFiles], removed: Mapping[str, str], served: frozenset[str]
) -> list[AdapterFiles]:
    """``removed``: adapter id -> when. Those to be restored are no longer removed; one may be served by now, where the
    same line is started again."""
    for adapter_id in options.restore:
        if adapter_id not in removed.keys() | served:
            known = ", ".join(sorted(removed)) or "none is"
            raise ConfigError(f"--restore {adapter_id}: it is not among those that were removed ({known})")
        if adapter_id not in {files.adapter_id for files in folders}:
            raise ConfigError(f"--restore {adapter_id}: no such folder in {options.adapters}")
    kept = [files for files in folders if files.adapter_id not in removed or files.adapter_id in options.restore]
    for files in folders:
        if files not in kept:
            when = removed[files.adapter_id]
            say(f"left out {files.adapter_id}: removed {when}; --restore {files.adapter_id} brings it back")
    if folders and not kept:
        raise ConfigError(
            f"--adapters {options.adapters}: every adapter there was removed; --restore ID brings one back"
        )
    return kept


def _taken(
    options: RunOptions, listing: Listing, served: frozenset[str], removed: Mapping[str, str]
) -> list[AdapterFiles]:
    """Less those that ``only`` and ``without`` leave out. Raises ConfigError for a pattern that means nobody."""
    say(*listing.left_out_lines())
    for option, patterns in (("only", options.only), ("without", options.without)):
        for pattern in patterns:
            if not matching({files.adapter_id for files in listing.adapters} | served | removed.keys(), (pattern,)):
                raise ConfigError(f"--{option} {pattern}: no such adapter in {options.adapters}")
    folders = [files for files in listing.adapters if options.takes(files.adapter_id)]
    if not folders:
        raise ConfigError(f"--adapters {options.adapters}: --only and --without leave no adapter")
    return folders
