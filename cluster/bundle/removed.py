"""What was removed on purpose, remembered beside CURRENT so that it never comes back by itself.

    <out>/REMOVED      {"<adapter id>": "<when, in UTC>"}, changed by conditional PUT only

It stands outside the manifests: a new bundle that was fitted without an adapter holds nothing of it, its name
included, and an old revision that CURRENT is rolled back to knows nothing of later removals. An adapter that CURRENT
serves is not removed, whatever is written here: a removal is noted before its revision is published, and may fail in
between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime

from cluster.errors import BundleError, PublishConflict, StoreConflict, StoreMissing
from cluster.store.protocol import Store

KEY = "REMOVED"
_ATTEMPTS = 8

Change = Callable[[dict[str, str]], dict[str, str]]


def read_removed(store: Store, served: Collection[str] = ()) -> dict[str, str]:
    """Adapter id -> when it was removed, of those that are not ``served``. Raises BundleError."""
    return {adapter_id: when for adapter_id, when in _read(store)[0].items() if adapter_id not in served}


def note_removed(store: Store, ids: Collection[str]) -> None:
    """Before the revision without them is published. Raises PublishConflict when others change it all the time."""
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    _change(store, lambda removed: removed | dict.fromkeys(ids, now))


def forget_removed(store: Store, notes: Mapping[str, str]) -> None:
    """Of adapters that are served again: these notes, as they were read, and none that was written since."""
    _change(store, lambda removed: {i: when for i, when in removed.items() if notes.get(i) != when})


def _read(store: Store) -> tuple[dict[str, str], str | None]:
    try:
        blob = store.read(KEY)
    except StoreMissing:
        return {}, None
    try:
        removed = json.loads(blob.data)
    except (ValueError, RecursionError):
        removed = None
    if not isinstance(removed, dict) or not all(
        isinstance(text, str) and text.isprintable() for text in (*removed, *removed.values())
    ):
        raise BundleError(
            f"{store.uri}/{KEY} is {blob.data[:80]!r}, expected adapter ids with the times they were removed, as JSON; "
            "correct it, or delete it: what was removed may come back then"
        )
    return removed, blob.etag


def _change(store: Store, changed: Change) -> None:
    for _ in range(_ATTEMPTS):
        before, etag = _read(store)
        after = changed(before)
        if after == before:
            return
        data = (json.dumps(after, sort_keys=True, indent=1) + "\n").encode()
        try:
            if etag is None:
                store.create(KEY, data)
            else:
                store.replace(KEY, data, if_match=etag)
        except StoreConflict:
            continue  # somebody else's, or our own whose answer was lost: what is there now tells
        return
    raise PublishConflict(f"{store.uri}/{KEY} is changed by others all the time; nothing was published, try again")
