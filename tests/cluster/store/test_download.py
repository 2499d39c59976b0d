"""A model's files, brought to the machine that loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import BaseModelError
from cluster.store import download as download_file
from cluster.store.address import open_store
from cluster.store.download import download


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "original").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "original/model.safetensors"):
        (folder / name).write_bytes(name.encode() * 10)
    return folder


def test_a_download_holds_the_files_that_are_needed_byte_for_byte(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_file, "PIECE_BYTES", 7)
    folder = download(open_store(str(source)), tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: (source / name).read_bytes() for name in ("config.json", "model.safetensors")
    }


def test_the_same_state_is_downloaded_once_and_a_new_one_again(source: Path, tmp_path: Path) -> None:
    store, cache = open_store(str(source)), tmp_path / "cache"
    first = download(store, cache)
    stamp = first.stat().st_mtime_ns
    assert download(store, cache) == first
    assert first.stat().st_mtime_ns == stamp
    store.write("config.json", b"other")
    second = download(store, cache)
    assert second != first
    assert (second / "config.json").read_bytes() == b"other"


def test_a_download_that_breaks_off_leaves_nothing_that_looks_whole(source: Path, tmp_path: Path) -> None:
    store, cache = open_store(str(source)), tmp_path / "cache"
    listed = list(store.list())
    store.list = lambda prefix="": iter(listed)  # type: ignore[method-assign]
    (source / "model.safetensors").write_bytes(b"replaced after the listing")
    with pytest.raises(BaseModelError, match=r"model\.safetensors changed"):
        download(store, cache)
    assert list(cache.iterdir()) == []
