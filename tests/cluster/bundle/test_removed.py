"""What was removed is remembered beside CURRENT, by writes that lose nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.bundle.removed import forget_removed, note_removed, read_removed
from cluster.errors import BundleError
from cluster.store.address import open_store


def test_what_is_noted_is_read_back_with_its_time_until_it_is_forgotten(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert read_removed(store) == {}
    forget_removed(store, {"nobody": "never"})
    assert list(store.list()) == []  # nothing to forget, nothing written
    note_removed(store, ["b", "t/a"])
    noted = read_removed(store)
    assert noted.keys() == {"b", "t/a"}
    ages = [datetime.now(UTC) - datetime.fromisoformat(when) for when in noted.values()]
    assert all(0 <= age.total_seconds() < 60 for age in ages)
    note_removed(store, ["c"])
    forget_removed(store, {"b": noted["b"], "elsewhere": noted["b"]})
    assert read_removed(store).keys() == {"t/a", "c"}
    assert read_removed(store)["t/a"] == noted["t/a"]
    note_removed(store, ["t/a"])
    forget_removed(store, noted)  # the note that was read, not the one made since
    assert read_removed(store).keys() == {"t/a", "c"}


def test_what_is_served_is_not_removed_whatever_is_noted(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    note_removed(store, ["a", "b"])
    assert read_removed(store, served={"a", "z"}).keys() == {"b"}


def test_notes_that_are_made_at_once_are_all_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: note_removed(store, [name]), "abcd"))
    assert read_removed(store).keys() == set("abcd")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b'{"a\\nb": "x"}', b"\xff", b"[" * 100_000])
def test_a_damaged_note_is_named_and_never_taken_for_nothing(tmp_path: Path, content: bytes) -> None:
    store = open_store(str(tmp_path))
    store.write("REMOVED", content)
    for use in (read_removed, lambda store: note_removed(store, ["a"])):
        with pytest.raises(BundleError, match="REMOVED"):
            use(store)
