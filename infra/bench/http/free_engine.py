"""An engine that costs nothing: at every step each sequence in flight gets one token, as in a real engine's batch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from unittest import mock

from cluster.bundle.reading import Bundle
from cluster.bundle.serving_map import ServingMap
from serve_app.engine.home_states import READY
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
from serve_app.replica.replica import GroupReplica, ReplicaSpec

STEP_SETTING = "CTS_BENCH_STEP_S"
_TEXT, _TOKEN, _PROMPT_TOKENS = " word", 5, 8


class FreeEngine:
    """Implements ``serve_app.engine.protocol.Engine``. A step takes ``step_s`` seconds."""

    def __init__(self, serving_map: ServingMap, homes: tuple[str, ...], step_s: float) -> None:
        self.serving_map = serving_map
        self._homes, self._step_s = homes, step_s
        self._num_running = 0

    async def start(self) -> None:
        self._step: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._steps = asyncio.create_task(self._run())

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        assert request.max_tokens is not None
        self._num_running += 1
        try:
            for number in range(1, request.max_tokens + 1):
                await asyncio.shield(self._step)
                reason = "length" if number == request.max_tokens else None
                yield GenerationChunk(_TEXT, (_TOKEN,), _PROMPT_TOKENS, number, reason)
        finally:
            self._num_running -= 1

    async def attach(self, home: str) -> None:
        raise NotImplementedError

    async def detach(self, home: str) -> None:
        raise NotImplementedError

    def health(self) -> EngineHealth:
        return EngineHealth(True, dict.fromkeys(self._homes, READY), {}, self._num_running, 0)

    async def stop(self) -> None:
        self._steps.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            done, self._step = self._step, asyncio.get_running_loop().create_future()
            done.set_result(None)


class FreeReplica(GroupReplica):
    """A replica with that engine and no base."""

    async def __init__(self, spec: ReplicaSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        with mock.patch("serve_app.replica.replica.make_engine", _make_engine):
            await super().__init__(spec)


def _make_engine(spec: ReplicaSpec) -> FreeEngine:
    serving_map = Bundle.open(spec.bundle, spec.revision).serving_map
    return FreeEngine(serving_map, spec.homes, float(os.environ[STEP_SETTING]))
