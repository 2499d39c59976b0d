"""Aliases looked at again and again: read where they are others, kept where they cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bundle.aliases import KEY, change_aliases
from cluster.errors import StoreUnreachable
from cluster.store.local import LocalStore
from cluster.store.protocol import Blob, Entry
from serve_app.routing.alias_reader import AliasReader

OLD, NEW = {"support": {"v7": 1}}, {"support": {"v8": 1}}


class Counting(LocalStore):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.num_read, self.is_up = 0, True

    def head(self, key: str) -> Entry:
        if not self.is_up:
            raise StoreUnreachable("connection refused")
        return super().head(key)

    def read(self, key: str, *, if_match: str | None = None) -> Blob:
        self.num_read += 1
        return super().read(key, if_match=if_match)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    (tmp_path / "CURRENT").write_text("{}")
    change_aliases(LocalStore(str(tmp_path)), lambda _: OLD)
    return Counting(str(tmp_path))


def test_the_file_is_read_once_for_each_time_that_it_changes(store: Counting) -> None:
    reader = AliasReader()
    assert [reader.look(store) for _ in range(3)] == [OLD] * 3
    assert store.num_read == 1
    change_aliases(LocalStore(store.uri), lambda _: NEW)
    assert [reader.look(store) for _ in range(3)] == [NEW] * 3
    assert (store.num_read, reader.state) == (2, "loaded")


def test_what_cannot_be_read_leaves_the_old_aliases_and_says_why_until_it_can(store: Counting, tmp_path: Path) -> None:
    reader = AliasReader()
    reader.look(store)
    (tmp_path / KEY).write_text('{"format": 1, "aliases": {"support": {"v8": 0}}}')
    assert reader.look(store) == OLD
    assert "no target has a weight above 0" in reader.state
    store.is_up = False
    assert reader.look(store) == OLD
    assert reader.state == "connection refused"
    store.is_up = True
    assert "no target has a weight above 0" in (reader.look(store) and reader.state)
    (tmp_path / KEY).unlink()
    change_aliases(LocalStore(store.uri), lambda _: NEW)
    assert (reader.look(store), reader.state) == (NEW, "loaded")


def test_aliases_end_with_their_file_but_not_with_the_folder_that_it_was_in(store: Counting, tmp_path: Path) -> None:
    reader = AliasReader()
    reader.look(store)
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(".unmounted"))
    assert reader.look(store) == OLD
    assert "CURRENT" in reader.state
    (tmp_path / "CURRENT.unmounted").rename(tmp_path / "CURRENT")
    assert (reader.look(store), reader.state) == ({}, "loaded")


def test_nothing_is_known_before_anything_could_be_read_and_no_file_is_no_aliases(
    store: Counting, tmp_path: Path
) -> None:
    (tmp_path / KEY).write_text("{")
    assert AliasReader().look(store) is None
    (tmp_path / KEY).unlink()
    reader = AliasReader()
    assert (reader.look(store), reader.look(store), reader.state) == ({}, {}, "loaded")
