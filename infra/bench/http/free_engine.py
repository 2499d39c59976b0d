"""An engine that costs nothing: at every step each sequence in flight gets one token, as in a real engine's batch."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from unittest import mock

from cluster.bundle.serving_map import ServedAdapter
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
from serve_app.engine.revisions import READY, Revision, RevisionHealth
from serve_app.replica.replica import GroupReplica, ReplicaSpec, open_revision

STEP_SETTING = "CTS_BENCH_STEP_S"
_TEXT, _TOKEN, _PROMPT_TOKENS = " word", 5, 8


class FreeEngine:
    """Implements ``serve_app.engine.protocol.Engine``. A step takes ``step_s`` seconds."""

    def __init__(self, revision: Revision, step_s: float) -> None:
        self._revision, self._step_s = revision, step_s
        self._num_running = 0

    def find(self, adapter_id: str, revision: int | None = None) -> ServedAdapter:
        return self._revision.serving_map.find(adapter_id)

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

    async def take_up(self, revision: Revision) -> None:
        raise NotImplementedError

    async def release(self, number: int) -> None:
        raise NotImplementedError

    def health(self) -> EngineHealth:
        own = RevisionHealth(dict.fromkeys(self._revision.homes, READY))
        return EngineHealth(True, {self._revision.number: own}, self._num_running, 0)

    async def ping(self) -> None:
        await asyncio.shield(self._step)

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
    return FreeEngine(open_revision(spec, spec.revision), float(os.environ[STEP_SETTING]))
