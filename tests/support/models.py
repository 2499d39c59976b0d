"""The real base model and the shipped adapters: what an engine's tests need besides an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY, ZOO


@pytest.fixture(scope="session")
def base_path() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder, made once into build/base."""
    from infra.demo.make_base import make_base

    target = REPOSITORY / "build" / "base"
    make_base(target)
    return target


@pytest.fixture(scope="session")
def zoo_path() -> Path:
    """The shipped real adapters, a folder each."""
    return ZOO / "adapters"
