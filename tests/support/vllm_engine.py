"""A vLLM engine with the homes of tests/support/engines.py, for tests in vLLM's own environment."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import torch

from serve_app.engine.revisions import Revision
from serve_app.engine.vllm.engine import VllmEngine
from serve_app.engine.vllm.options import VllmSettings
from tests.support.engines import BROKEN, CLUSTERS, FACTORS, MAX_BATCH, MAX_MODEL_LEN, Homes, collect, serving_map

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRST_HOMES = (*CLUSTERS, *FACTORS, *BROKEN.values())
T = TypeVar("T")


def make_engine(base_path: Path, homes: Homes, wanted: tuple[str, ...] = FIRST_HOMES, **options: Any) -> VllmEngine:
    limits = {
        "device": DEVICE,
        "max_batch": MAX_BATCH,
        "max_model_len": MAX_MODEL_LEN,
        "num_threads": 2,
        "kv_bytes": 400 << 20,
    }
    return VllmEngine(base_path, Revision(0, serving_map(), wanted, homes.load), VllmSettings(**limits | options))


class Running:
    """An engine and the one event loop that it belongs to."""

    def __init__(self, engine: VllmEngine) -> None:
        self.engine, self.runner = engine, asyncio.Runner()
        self.run(engine.start())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def tokens(self, *requests: Any) -> list[list[int]]:
        """All in flight together."""

        async def gather() -> list[list[int]]:
            answers = await asyncio.gather(*(collect(self.engine, request) for request in requests))  # type: ignore[arg-type]
            return [answer.token_ids for answer in answers]

        return self.run(gather())

    def close(self) -> None:
        self.run(self.engine.stop())
        self.runner.close()
