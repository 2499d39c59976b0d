"""A collection of tiny adapters and what is published of it, changed by the commands as a user types them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cluster.bundle.reading import Bundle
from cluster.errors import StoreMissing
from compress_jobs.__main__ import main
from infra.bench.collection import Collection, write

SHAPE = Collection(adapters=12, layers=1, hidden=32, kv_width=16, rank=2)


class Place:
    """``adapters``, the collection: a0, a1, ... at first. ``out``, where it is published."""

    def __init__(self, generated: Path, root: Path, number: int) -> None:
        self.generated, self.adapters, self.out = generated, root / "adapters", root / "out"
        self.base = generated / "base"
        for name in range(number):
            self.upload(f"a{name}")

    def upload(self, name: str, to: str = "") -> Path:
        """Whatever was in that folder is gone."""
        folder = self.adapters / (to or name)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.generated / "adapters" / name, folder)
        return folder

    def call(self, command: str, *more: str) -> int:
        source = ["--adapters", str(self.adapters), "--base", str(self.base)]
        if command == "run":
            return main([command, *source, "--out", str(self.out), "--rank", "2", "--gate", "1", *more])
        return main([command, str(self.out), *(source if command in ("add", "update", "compact") else []), *more])

    def served(self) -> set[str]:
        try:
            return set(Bundle.open(str(self.out)).manifest.adapters)
        except StoreMissing:
            return set()

    def current(self) -> bytes:
        return (self.out / "CURRENT").read_bytes()


@pytest.fixture(scope="session")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and twelve tiny ``adapters``, a0 to a11. Never to be changed."""
    root = tmp_path_factory.mktemp("generated") / "made"
    write(SHAPE, root)
    for number in range(SHAPE.adapters):
        (root / "adapters" / f"adapter-{number:04}").rename(root / "adapters" / f"a{number}")
    return root


@pytest.fixture
def place(generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Six adapters, none published yet. The test's module has connected Ray."""
    from compress_jobs.job import ray_cluster

    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)
    return Place(generated, tmp_path, 6)
