"""The wheel: it holds all that a user runs, and says what it is."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY, ZOO

PACKAGES = ("cluster", "compress_jobs", "serve_app")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for building leaves folders behind where it is done."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(target)]
    done = subprocess.run([*line, str(source)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_every_file_of_its_packages_and_nothing_else(unpacked: Path) -> None:
    def files(root: Path) -> set[str]:
        return {str(p.relative_to(root)) for package in PACKAGES for p in (root / package).rglob("*.py")}

    assert files(unpacked) == files(REPOSITORY)
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_says_what_it_is(unpacked: Path, wheel: Path) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    info = next(unpacked.glob("*.dist-info"))
    lines = (info / "METADATA").read_text().splitlines()
    assert f"Version: {project['version']}" in lines
    assert "License-Expression: Apache-2.0" in lines
    assert (info / "licenses" / "LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()
    entry_points = configparser.ConfigParser()
    entry_points.read(info / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {"compress-jobs": "compress_jobs.__main__:main"}
    assert "compress_then_serve" in entry_points["vllm.general_plugins"]


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}" in (REPOSITORY / "CHANGELOG.md").read_text()
    said = subprocess.run(
        [sys.executable, "-m", "compress_jobs", "--version"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert said.stdout == f"compress-then-serve {version}\n"


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_collection_is_compressed_by_what_the_wheel_holds(unpacked: Path, base_path: Path, tmp_path: Path) -> None:
    """With this environment's libraries, and nothing of this checkout on the path."""
    code = (
        f"import sys, cluster; assert cluster.__file__.startswith({str(unpacked)!r}); "
        "from compress_jobs.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", code, "run", "--adapters", str(ZOO / "adapters"), "--base", str(base_path)]
    line += ["--out", str(tmp_path / "out"), "--clusters", "2", "--rank", "8", "--num-cpus", "2"]
    # For Ray's workers too, whose path is not the driver's.
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "CURRENT").exists()
