"""``remove``: adapters out of the bundle. What it does not do is stated wherever it speaks."""

from __future__ import annotations

import time
from collections.abc import Collection

from cluster.bundle.removed import note_removed
from cluster.errors import ConfigError
from compress_jobs.lifecycle.aliased import needed_by
from compress_jobs.lifecycle.revision import next_revision, open_current, publish_next
from compress_jobs.lifecycle.source import need_known

REMAINS = (
    "The bases keep a trace of it, because they were fitted with it, until `compact --without` fits them without it; "
    "earlier revisions keep its core until `gc` deletes them."
)


def remove_adapters(out: str, ids: Collection[str]) -> list[str]:
    """Publish a revision without them; returns what it did, in lines.

    Raises ConfigError for an id that is not served or that an alias sends requests to, and when nothing would be left.
    """
    began, standing = time.monotonic(), open_current(out)
    served = standing.manifest.adapters
    need_known(ids, served, "--adapter", f"not in the current revision of {out}; `show` lists those that are")
    if not served.keys() - set(ids):
        raise ConfigError(f"--adapter: nothing would be left to serve; delete {standing.store.uri} if that is meant")
    needed = needed_by(standing.store)
    if kept := [adapter_id for adapter_id in sorted(set(ids)) if adapter_id in needed]:
        told = ", ".join(f"{adapter_id} (alias {needed[adapter_id]})" for adapter_id in kept)
        raise ConfigError(
            f"--adapter {told}: requests for the alias would get a 404; point it elsewhere by `alias` first"
        )
    note_removed(standing.store, ids)
    manifest = next_revision(standing, ids)
    lines = [f"removed    {adapter_id} ({_was(served[adapter_id].cluster)})" for adapter_id in sorted(set(ids))]
    lines += publish_next(standing, manifest, "remove", began)
    return [*lines, f"remains    {REMAINS}"]


def _was(cluster: str | None) -> str:
    return "was served by its own factors" if cluster is None else f"was on cluster {cluster}"
