"""Who may import whom: the table in pyproject.toml holds, and would be seen to break."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

PACKAGES = ("cluster", "compress_jobs", "serve_app", "infra")

# What is done to a copy of the code -> (file, a line added to it, how the contract that breaks begins).
BROKEN = {
    "two-applications": ("compress_jobs/lifecycle/add.py", "from serve_app import placement", "compress_jobs ->"),
    "from-the-library-up": ("cluster/bundle/publish.py", "import compress_jobs.progress", "compress_jobs ->"),
    "from-the-store-up": ("cluster/store/s3.py", "from cluster.bundle import manifest", "the library, from"),
    "beside-each-other": ("cluster/compression/svd.py", "from cluster.bundle import manifest", "the library, from"),
    "from-the-job-up": ("compress_jobs/job/fit.py", "from compress_jobs.lifecycle import gc", "the job, from"),
    "a-new-folder": ("compress_jobs/attic/old.py", "", "the job, from"),
    "from-an-engine-up": ("serve_app/engine/prompt.py", "from serve_app.openai import errors", "the application"),
    "between-engines": ("serve_app/engine/vllm/engine.py", "import serve_app.engine.transformers.loop", "an engine"),
    "from-the-plugin-up": (
        "serve_app/engine/vllm/plugin/worker.py",
        "import serve_app.engine.vllm.options",
        "the vLLM",
    ),
    "a-circle-of-files": ("cluster/store/protocol.py", "from cluster.store import local", "no circle"),
    "a-circle-in-a-function": ("infra/train_zoo/task.py", "def f():\n    import infra.train_zoo.words", "no circle"),
    "ray-in-the-library": ("cluster/compression/svd.py", "def f():\n    import ray.util", "the library knows no Ray"),
    "http-in-the-job": ("compress_jobs/report/page.py", "import fastapi", "the job knows no HTTP"),
    "ray-in-an-engine": ("serve_app/engine/transformers/loop.py", "import ray", "engines run without Ray"),
    "transformers-in-vllm": ("serve_app/engine/vllm/plugin/parent.py", "import transformers", "what runs inside vLLM"),
}


def lint(folder: Path) -> tuple[int, str]:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_every_contract_holds() -> None:
    status, printed = lint(REPOSITORY)
    assert status == 0, printed
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert f"Contracts: {len(contracts)} kept, 0 broken." in printed


@pytest.mark.parametrize(("file", "line", "contract"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_contract_is_named(file: str, line: str, contract: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "zoo"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")
    status, printed = lint(tmp_path)
    assert status == 1, printed
    broken = [row.removesuffix(" BROKEN") for row in printed.splitlines() if row.endswith(" BROKEN")]
    assert any(name.startswith(contract) for name in broken), printed


def test_every_contract_is_broken_by_one_of_these() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    unbroken = {c["name"] for c in contracts if not any(c["name"].startswith(name) for _, _, name in BROKEN.values())}
    assert not unbroken


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(str(node.module).split(".")[0])
    return packages


def test_the_library_imports_nothing_but_its_own_dependencies() -> None:
    allowed = {"torch", "numpy", "safetensors", "boto3", "botocore", "urllib3", "regex", "cluster"} | set(
        sys.stdlib_module_names
    )
    found = set.union(*(imported_packages(path) for path in (REPOSITORY / "cluster").rglob("*.py")))
    assert found <= allowed


def test_no_package_imports_anything_of_its_own_accord() -> None:
    """A package that imports its files is a circle that no folder shows, and costs whoever needs one of them."""
    files = [path for package in (*PACKAGES, "tests") for path in (REPOSITORY / package).rglob("__init__.py")]
    assert len(files) > 20
    assert [path for path in files if imported_packages(path)] == []
