"""What is left to do once CURRENT has moved. The bundle is published by then: nothing here may fail the job, and what
a store refuses now the next run, or ``report``, does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cluster.bundle.manifest import Manifest
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import revision_key
from cluster.errors import CtsError, StoreMissing
from cluster.store.protocol import Store
from compress_jobs.report.render import read_notes, render


def complete_page(store: Store, manifest: Manifest, notes: Mapping[str, Any] | None = None) -> None:
    """report.html beside the manifest of a run, unless it is there; ``notes`` are its report.json, None to read it.
    Raises CtsError."""
    key = revision_key(manifest.bundle, manifest.revision, "report.html")
    try:
        store.head(key)
    except StoreMissing:
        if notes is None:
            notes = read_notes(Bundle(store, manifest))
        store.write(key, render(manifest, notes).encode())


def unfinished(step: Callable[[], None]) -> str | None:
    """Does the step; returns what a person reads where it has failed, or None."""
    try:
        step()
    except CtsError as error:
        return f"published, but not all beside it is written: {error}; the next run or `report` completes it"
    return None
