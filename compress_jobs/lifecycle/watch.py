"""``watch``: a bundle in step with its collection, by rounds that do what `add`, `update` and `remove` would do.

What a round has looked at is remembered, so that an adapter which is refused, or was only copied again, is not read in
every round. What changed while nobody watched is found by the ETag of the weights, which the manifest has.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from cluster.adapters.record import AdapterFiles
from cluster.bundle.manifest import Adapter, Manifest
from cluster.bundle.removed import read_removed
from compress_jobs.lifecycle.aliased import needed_by
from compress_jobs.lifecycle.newcomers import grade, read_collection
from compress_jobs.lifecycle.revision import next_revision, open_current, publish_next
from compress_jobs.lifecycle.source import Source

DROPS_ALL = "all"


@dataclass(frozen=True)
class Round:
    """``lines`` are what the commands would have printed; ``manifest`` is what is current after it."""

    manifest: Manifest
    added: int
    updated: int
    removed: int
    refused: int
    held_back: int
    lines: list[str]

    def line(self) -> str:
        held = f", {self.held_back} gone and held back" if self.held_back else ""
        return (
            f"{self.manifest.bundle} revision {self.manifest.revision}: {len(self.manifest.adapters)} served; "
            f"{self.added} added, {self.updated} updated, {self.removed} removed, {self.refused} refused{held}"
        )


class Watch:
    """``allow_drop``: how many served adapters may go in a round because their folders have, a number or "all"; None: a
    tenth of them. Where more have gone, none is removed: a collection that looks empty is more often a mistake."""

    def __init__(self, source: Source, allow_drop: str | None = None) -> None:
        self._source, self._allow_drop = source, allow_drop
        self._seen: dict[str, AdapterFiles] = {}
        self._is_first = True

    def look(self) -> Round:
        """One round: publishes a revision where anything has changed. Raises as ``add_adapters`` does; nothing new is
        visible then, and nothing of the round is remembered."""
        began, standing = time.monotonic(), open_current(self._source.out)
        manifest = standing.manifest
        base, folders = read_collection(self._source, manifest, tell=self._is_first)
        left_out = read_removed(standing.store, manifest.adapters)
        changed = {i: files for i, files in folders.items() if self._has_changed(files, manifest.adapters.get(i))}
        # What was removed by hand stays so, as for `add`.
        changed = {i: files for i, files in changed.items() if i not in left_out}
        gone = sorted(manifest.adapters.keys() - folders.keys())
        needed = needed_by(standing.store) if gone else {}
        free = [adapter_id for adapter_id in gone if adapter_id not in needed]
        leaving = free if len(free) <= self._may_go(manifest) else []
        graded = grade(replace(self._source, ids=(), restore=()), standing, base, list(changed.values()))
        served = manifest.adapters.keys()
        lines = graded.lines("taken up")
        lines += [
            f"held back  {adapter_id}: its folder has gone, but the alias {needed[adapter_id]} sends requests to it; "
            "it stays until `alias` moves that"
            for adapter_id in gone
            if adapter_id in needed
        ]
        if free and not leaving:
            lines.append(
                f"held back  {len(free)} of {len(served)} served adapters have no folder any more, such as {free[0]}: "
                f"more than the {self._may_go(manifest)} that may go in a round (--allow-drop); none is removed"
            )
        if graded.arrivals or leaving:
            refused = {i: own for i, own in graded.refused.items() if i not in served}
            layout = self._source.layout(manifest)
            manifest = next_revision(
                standing, leaving, graded.arrivals, refused, base.modules, self._source.accept_base, layout
            )
            lines += [f"removed    {adapter_id}: its folder has gone" for adapter_id in leaving]
            lines += publish_next(standing, manifest, "watch", began)
        # Of one that could not be read at all nothing is known: permissions change without an ETag.
        unread = {i for i, own in graded.refused.items() if own.reason == "unreadable"}
        self._seen, self._is_first = {i: files for i, files in folders.items() if i not in unread}, False
        updated = graded.arrivals.keys() & served
        return Round(
            manifest,
            added=len(graded.arrivals) - len(updated),
            updated=len(updated),
            removed=len(leaving),
            refused=len(graded.refused),
            held_back=len(gone) - len(leaving),
            lines=lines,
        )

    def _has_changed(self, files: AdapterFiles, served: Adapter | None) -> bool:
        if files.adapter_id in self._seen:
            return files != self._seen[files.adapter_id]
        return served is None or files.weights is None or files.weights.etag != served.etag

    def _may_go(self, manifest: Manifest) -> int:
        """Not all of them, whatever was allowed: there must be something left to serve."""
        count = len(manifest.adapters)
        if self._allow_drop is None:
            return min(max(1, count // 10), count - 1)
        return count - 1 if self._allow_drop == DROPS_ALL else min(int(self._allow_drop), count - 1)
