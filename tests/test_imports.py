"""Who may import whom: compress_jobs -> cluster <- serve_app, and engines stay free of Ray and HTTP."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# Folder -> top-level packages it must not import, wherever in a file the import stands.
FORBIDDEN = {
    "cluster": {
        "ray",
        "fastapi",
        "starlette",
        "pydantic",
        "transformers",
        "vllm",
        "peft",
        "compress_jobs",
        "serve_app",
    },
    "compress_jobs": {"serve_app", "fastapi", "starlette", "vllm"},
    "serve_app": {"compress_jobs"},
    "serve_app/engine/vllm/plugin": {"ray", "fastapi", "starlette", "pydantic", "transformers", "compress_jobs"},
    "serve_app/engine": {"ray", "fastapi", "starlette", "pydantic", "compress_jobs"},
}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(str(node.module).split(".")[0])
    return packages


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_the_import_rule_holds(folder: str) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files, f"{folder} holds no Python file: the rule checks nothing"
    broken = {f"{path.name} imports {name}" for path in files for name in imported_packages(path) & FORBIDDEN[folder]}
    assert not broken


def test_the_rule_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("def f():\n    import ray.serve\n    from serve_app.app import build\n")
    assert imported_packages(path) == {"ray", "serve_app"}


def test_the_library_imports_nothing_but_its_own_dependencies() -> None:
    allowed = {"torch", "numpy", "safetensors", "boto3", "botocore", "urllib3", "regex", "cluster"} | set(
        sys.stdlib_module_names
    )
    found = set.union(*(imported_packages(path) for path in (REPOSITORY / "cluster").rglob("*.py")))
    assert found <= allowed
