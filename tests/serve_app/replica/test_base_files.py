"""The base's files, brought to the machine that loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.adapters.base import read_base
from cluster.bundle.manifest import Base
from cluster.errors import BaseModelError
from serve_app.replica.base_files import is_hub_id, resolve_base


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
