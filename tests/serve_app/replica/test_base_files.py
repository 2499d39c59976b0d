"""The base's files, brought to the machine that loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.adapters.base import read_base
from cluster.bundle.manifest import Base
from cluster.errors import BaseModelError
from cluster.store.address import open_store
from serve_app.replica import base_files
from serve_app.replica.base_files import download, is_hub_id, resolve_base


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
    monkeypatch.setattr(base_files, "PIECE_BYTES", 7)
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


def test_the_base_of_another_bundle_is_refused(base_path: Path) -> None:
    model = read_base(str(base_path))
    assert resolve_base(str(base_path), Base(model.name, model.fingerprint)) == base_path
    with pytest.raises(BaseModelError, match="fingerprint"):
        resolve_base(str(base_path), Base(model.name, "sha256:" + "0" * 64))


def test_a_hub_id_is_told_from_a_folder(base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_id("org/name")
    assert not is_hub_id(str(base_path))
    assert not is_hub_id("s3://bucket/name")
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("org/name")


def test_a_hub_that_cannot_be_reached_is_a_base_model_error_that_says_what_to_give() -> None:
    with pytest.raises(BaseModelError, match="give a local folder"):
        resolve_base("nobody/nothing-here", Base("nobody/nothing-here", "sha256:" + "0" * 64))
