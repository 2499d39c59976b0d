"""``gc``: deletes what no kept revision needs, and nothing that a job in flight may still publish.

Two bounds on what may be deleted, both by the store's clock: it is older than the grace age, and it was last written
before CURRENT was last moved. The second holds at any grace: a job that can still publish began after that move (else
its own conditional write of CURRENT fails), and writes again whatever it takes up (``cluster.bundle.publish``).
Objects are listed before manifests, so that what a manifest names was not overlooked; a manifest goes before its
objects, so that what is visible is whole; and each thing is looked at once more right before it is deleted.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cluster.bundle.aliases import KEY as ALIASES
from cluster.bundle.removed import KEY as REMOVED
from cluster.bundle.revisions import object_key, read_current, read_manifest
from cluster.errors import PublishConflict, StoreMissing
from cluster.store.protocol import Entry, Store

_SHA = re.compile(rb"sha256:[0-9a-f]{64}")
_OBJECT = re.compile(r"objects/[0-9a-f]{64}\.safetensors")
_REVISION = re.compile(
    r"bundles/(?P<bundle>b-[0-9a-f]{16})/revisions/(?P<revision>0|[1-9][0-9]*)/"
    r"(?P<file>manifest\.json|report\.json|report\.html)"
)

Name = tuple[str, int]
"""A revision: its bundle and number."""


@dataclass
class Collected:
    """What was deleted (or would be), by kind, and what was left alone and why."""

    deleted: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    kept_revisions: int = 0
    kept_objects: int = 0
    too_young: int = 0
    unknown: int = 0


@dataclass(frozen=True)
class _Bounds:
    """``before_s``: what was written at this time or later stays. ``current_etag``: CURRENT as it was then."""

    before_s: float
    current_etag: str


def collect(store: Store, grace_s: float, keep: int, dry_run: bool = False) -> Collected:
    """Delete what no kept revision needs; see the module's own words for what is spared.

    Raises StoreMissing without a CURRENT (nothing can be told from garbage then), BundleError for a kept manifest that
    cannot be read, PublishConflict as soon as CURRENT moves: what is deleted by then was garbage, the rest stays.
    """
    current, etag, moved_s = _look_at_current(store)
    now_s = store.clock_s()
    listed = list(store.list())
    revisions = _revisions(store.list("bundles/"))
    manifests = {name: files["manifest.json"] for name, files in revisions.items() if "manifest.json" in files}
    current_since_s = min((e.modified_s for name, e in manifests.items() if name[0] == current[0]), default=now_s)
    bounds = _Bounds(min(now_s - grace_s, moved_s), etag)
    numbers = sorted(number for bundle, number in manifests if bundle == current[0])
    kept = {current, *((current[0], number) for number in numbers[-keep:])}
    if current_since_s > now_s - grace_s:
        kept |= {name for name in manifests if name[0] != current[0]}
    result = Collected()
    delete = _deleter(store, bounds, result, dry_run)

    staying = set()
    for name, files in sorted(revisions.items()):
        if name in manifests and (name in kept or not delete("revisions", manifests[name])):
            staying.add(name)
            continue
        for entry in files.values():
            if not entry.key.endswith("manifest.json"):
                delete("reports", entry)
    needed = {object_key(sha) for name in sorted(staying) for sha in _objects_of(store, name, current)}
    for parts in _jobs(listed).values():
        if max(entry.modified_s for entry in parts) < bounds.before_s:
            for entry in parts:
                delete("parts of jobs", entry)
        else:
            result.too_young += len(parts)
            needed |= _objects_in(store, parts)
    for entry in listed:
        if _OBJECT.fullmatch(entry.key):
            if entry.key in needed:
                result.kept_objects += 1
            else:
                delete("objects", entry)
        elif (
            entry.key not in ("CURRENT", REMOVED, ALIASES)
            and not entry.key.startswith("work/")
            and _REVISION.fullmatch(entry.key) is None
        ):
            result.unknown += 1
    result.kept_revisions = len(staying)
    return result


def _look_at_current(store: Store) -> tuple[Name, str, float]:
    """What CURRENT names, its ETag, and when it was moved there."""
    found = read_current(store)
    if found is None:
        raise StoreMissing(
            f"{store.uri}: no CURRENT there, so nothing tells garbage from what is needed; publish a bundle first "
            "(`run`), or check the address"
        )
    entry = store.head("CURRENT")
    if entry.etag != found[1]:
        raise PublishConflict(f"{store.uri}/CURRENT is being moved right now; nothing was deleted, run gc again")
    return (found[0].bundle, found[0].revision), entry.etag, entry.modified_s


def _revisions(entries: Iterable[Entry]) -> dict[Name, dict[str, Entry]]:
    """Each revision's files by name; one without a manifest is what a former gc or a failed job left."""
    revisions: dict[Name, dict[str, Entry]] = {}
    for entry in entries:
        if match := _REVISION.fullmatch(entry.key):
            revisions.setdefault((match["bundle"], int(match["revision"])), {})[match["file"]] = entry
    return revisions


def _objects_of(store: Store, name: Name, current: Name) -> Iterable[str]:
    try:
        return read_manifest(store, *name).objects
    except StoreMissing:
        if name == current:
            raise
        return ()  # another gc was faster


def _jobs(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """What lies in ``work/``, by job. A job that was stopped and goes on takes up its old parts, and the objects that
    they name, without writing them again: they are as young as the youngest."""
    jobs: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.key.startswith("work/"):
            jobs.setdefault(entry.key.split("/")[1], []).append(entry)
    return jobs


def _objects_in(store: Store, parts: Iterable[Entry]) -> set[str]:
    named: set[str] = set()
    for entry in parts:
        if entry.key.endswith(".json"):
            with contextlib.suppress(StoreMissing):  # the job is over, and has tidied up
                named |= {object_key(sha.decode()) for sha in _SHA.findall(store.read(entry.key).data)}
    return named


def _deleter(store: Store, bounds: _Bounds, result: Collected, dry_run: bool) -> Callable[[str, Entry], bool]:
    """A function (kind, entry) -> whether it is gone. Counts into ``result``."""

    def delete(kind: str, listed: Entry) -> bool:
        try:
            entry = store.head(listed.key) if listed.modified_s < bounds.before_s else listed
        except StoreMissing:
            return True
        if entry.modified_s >= bounds.before_s:
            result.too_young += 1
            return False
        if not dry_run:
            if store.head("CURRENT").etag != bounds.current_etag:
                raise PublishConflict(
                    f"{store.uri}/CURRENT was moved while gc ran; gc stopped after {result.deleted.total()} deletions, "
                    "nothing that is needed was lost: run it again"
                )
            store.delete(entry.key)
        result.deleted[kind] += 1
        result.num_bytes += entry.size_bytes
        return True

    return delete
