"""``add`` and ``update``: adapters onto the bases that stand, without a refit."""

from __future__ import annotations

import argparse
import time
from typing import Any

from compress_jobs.lifecycle.newcomers import grade, read_collection
from compress_jobs.lifecycle.revision import Standing, next_revision, open_current, publish_next
from compress_jobs.lifecycle.source import Source, add_source_arguments, need_known, source_of

_ADD = """\
Put new adapters of the collection onto the bases that stand: each on the cluster that captures most of it, if its error
there meets the bundle's gate, else truncated, else raw. Nothing is fitted anew, so a new adapter loses more on a basis
than one that was fitted: `compact` fits anew when that has gone too far. Publishes the next revision of the bundle; all
objects but the changed clusters' cores are shared with the one before. Where adapters of different tenants are kept
apart, a new one is tried on its own tenant's clusters only.
"""
_UPDATE = """\
Take up the adapters whose source has changed since: each is read, and where its content (weights or config) is not the
version that is served, projected anew as by `add`. Without --adapter the whole collection is read once, as by the first
pass of `run`; named ones take seconds. One that is refused now stays served as it was, and is named.
"""


def add_parser(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    add = commands.add_parser(
        "add", help="put new adapters onto the bases that stand", description=_ADD, formatter_class=raw
    )
    add_source_arguments(add, "these only (default: all that the current revision lacks)")
    add.set_defaults(execute=lambda parsed: _tell(add_adapters(source_of(parsed))))
    update = commands.add_parser(
        "update", help="take up adapters whose source has changed", description=_UPDATE, formatter_class=raw
    )
    add_source_arguments(update, "these only (default: every one that is served)")
    update.set_defaults(execute=lambda parsed: _tell(update_adapters(source_of(parsed))))


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
    chosen = [files for i, files in folders.items() if i not in served and (not source.ids or i in source.ids)]
    graded = grade(source, standing, base, chosen)
    if not graded.arrivals:
        return [*graded.lines("added"), _nothing(standing, "nothing to add")]
    manifest = next_revision(standing, (), graded.arrivals, graded.refused, base.modules)
    return [*graded.lines("added"), *publish_next(standing, manifest, "add", began)]


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
    manifest = next_revision(standing, (), graded.arrivals, {}, base.modules)
    return [*lines, *publish_next(standing, manifest, "update", began)]


def _nothing(standing: Standing, what: str) -> str:
    return f"unchanged  {what}; {standing.manifest.bundle} revision {standing.manifest.revision} stays current"


def _tell(lines: list[str]) -> int:
    print("\n".join(lines))
    return 0
