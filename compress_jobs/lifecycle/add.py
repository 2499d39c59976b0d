"""``add`` and ``update``: adapters onto the bases that stand, without a refit."""

from __future__ import annotations

import time
from contextlib import suppress

from cluster.bundle.removed import forget_removed, read_removed
from cluster.errors import CtsError
from compress_jobs.lifecycle.newcomers import grade, read_collection
from compress_jobs.lifecycle.revision import Standing, next_revision, open_current, publish_next
from compress_jobs.lifecycle.source import Source, need_known


def add_adapters(source: Source) -> list[str]:
    """Publish a revision with the adapters of ``source`` that CURRENT's lacks; returns what it did, in lines.

    Raises ConfigError for an unknown id, one that is there already, or another base; otherwise as ``grade`` and
    ``publish`` do. Nothing new is visible then.
    """
    began, standing = time.monotonic(), open_current(source.out)
    served = standing.manifest.adapters
    base, folders = read_collection(source, standing.manifest)
    need_known(source.ids, folders, "--adapter", f"no such folder in {source.adapters}")
    need_known(
        source.ids, folders.keys() - served.keys(), "--adapter", "served already; `update` takes up a new source"
    )
    removed = read_removed(standing.store, served)
    need_known(source.restore, removed.keys() | served.keys(), "--restore", "not among those that were removed")
    need_known(source.restore, folders, "--restore", f"no such folder in {source.adapters}")
    left_out = removed.keys() - set(source.restore)
    need_known(source.ids, folders.keys() - left_out, "--adapter", "it was removed; --restore brings it back")
    wanted = {*source.ids, *source.restore} or set(folders)
    chosen = [files for i, files in folders.items() if i in wanted and i not in served and i not in left_out]
    graded = grade(source, standing, base, chosen)
    lines = [
        *graded.lines("added"),
        *(f"left out   {i}, removed {removed[i]}: --restore {i} brings it back" for i in sorted(left_out & wanted)),
    ]
    if not graded.arrivals:
        return [*lines, _nothing(standing, "nothing to add")]
    manifest = next_revision(
        standing,
        (),
        graded.arrivals,
        graded.refused,
        base.modules,
        source.accept_base,
        source.layout(standing.manifest),
    )
    lines += publish_next(standing, manifest, "add", began)
    back = {i: when for i, when in removed.items() if i in graded.arrivals}
    with suppress(CtsError):  # it is published; a note of who is served is not looked at
        forget_removed(standing.store, back)
    return lines


def update_adapters(source: Source) -> list[str]:
    """Publish a revision in which the adapters whose source has changed are what their source is now; returns what
    it did, in lines. Raises as ``add_adapters`` does."""
    began, standing = time.monotonic(), open_current(source.out)
    served = standing.manifest.adapters
    base, folders = read_collection(source, standing.manifest)
    need_known(source.ids, served, "--adapter", f"not in the current revision of {source.out}; `add` takes new ones")
    need_known(source.ids, folders, "--adapter", f"no such folder in {source.adapters}; `remove` takes them out")
    chosen = [files for i, files in folders.items() if i in served and (not source.ids or i in source.ids)]
    graded = grade(source, standing, base, chosen)
    lines = [*graded.lines("updated"), f"unchanged  {len(graded.unchanged)}"]
    if gone := sorted(served.keys() - folders.keys()):
        lines.append(f"gone       {len(gone)} served adapters have no folder any more, such as {gone[0]}: see `remove`")
    if not graded.arrivals:
        return [*lines, _nothing(standing, "nothing to update")]
    layout = source.layout(standing.manifest)
    manifest = next_revision(standing, (), graded.arrivals, {}, base.modules, source.accept_base, layout)
    return [*lines, *publish_next(standing, manifest, "update", began)]


def _nothing(standing: Standing, what: str) -> str:
    return f"unchanged  {what}; {standing.manifest.bundle} revision {standing.manifest.revision} stays current"
