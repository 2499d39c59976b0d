"""The transformers engine: one base model and the revisions that are resident, asked from any event loop.

Keys and values belong to one request's row and are dropped with it. Nothing is reused between requests, so
no prefix ever crosses served revisions. The model itself belongs to the loop's thread (loop.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import torch

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServedAdapter, home_of
from cluster.errors import EngineStopped
from cluster.units import gib
from serve_app.engine.prompt import PromptReader
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
from serve_app.engine.revisions import Revision, RevisionHealth, refusal
from serve_app.engine.transformers.adapted_linear import AdaptedLinears
from serve_app.engine.transformers.base_model import BaseModel, load_base
from serve_app.engine.transformers.generation import Answer, Generation
from serve_app.engine.transformers.grammar import Grammars
from serve_app.engine.transformers.loop import EngineLoop
from serve_app.engine.transformers.memory import free_bytes
from serve_app.engine.transformers.settings import DTYPES, EngineSettings

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Implements ``serve_app.engine.protocol.Engine``. It starts once; ``generate``, ``take_up`` and
    ``release`` may be called from any event loop."""

    def __init__(self, base: Path, first: Revision, settings: EngineSettings) -> None:
        self._base_path, self._first, self._settings = base, first, settings
        self._device, self._dtype = torch.device(settings.device), DTYPES[settings.dtype]
        self._loop: EngineLoop | None = None

    async def start(self) -> None:
        """Raises BaseModelError or ConfigError when the base cannot be served; a home that fails is recorded."""
        base = await asyncio.to_thread(self._load_base)
        self._reader = PromptReader(base.tokenizer, base.vocab_size, self._settings.max_model_len)
        self._grammars = Grammars(base.tokenizer, base.eos_ids)
        self._linears = AdaptedLinears(base.model)
        self._loop = EngineLoop(base, self._first.serving_map.base_name, self._linears, self._settings)
        self._loop.start()
        await self._load_all(self._loop.hold(self._first))
        self._loop.confirm(self._first.number)

    def find(self, adapter_id: str, revision: int | None = None) -> ServedAdapter:
        return self._running().find(adapter_id, revision)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        served = None if request.adapter is None else self.find(request.adapter, request.revision)
        self._running().check_available(served)
        if special := self._reader.special_stops(request.stop):
            request = replace(request, stop_token_ids=(*request.stop_token_ids, *special))
        template = served.chat_template if served else None
        prompt_ids, max_tokens = await self._reader.read_aside(request, template)
        schema = request.json_schema
        grammar = None if schema is None else await self._grammars.make_aside(schema)
        event_loop, answers = asyncio.get_running_loop(), asyncio.Queue[Answer]()

        def deliver(answer: Answer) -> None:
            try:
                event_loop.call_soon_threadsafe(answers.put_nowait, answer)
            except RuntimeError:  # the event loop was closed: nobody is left to read
                generation.cancelled = True

        generation = Generation(request, served, prompt_ids, max_tokens, self._reader.tokenizer, deliver, grammar)
        self._running().submit(generation)
        try:
            while True:
                answer = await answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
                if answer.finish_reason is not None:
                    return
        finally:
            generation.cancelled = True

    async def take_up(self, revision: Revision) -> None:
        loop = self._running()
        known = revision.number in loop.health().revisions
        homes = loop.hold(revision)
        if not known and (lack := self._lack_of_memory(revision, homes)):
            await self.release(revision.number)
            raise refusal(revision.number, [lack])
        await self._load_all(homes)
        if not known and (told := loop.newly_failed(revision.number)):
            await self.release(revision.number)
            raise refusal(revision.number, told)
        loop.confirm(revision.number)

    def _lack_of_memory(self, revision: Revision, homes: Sequence[str]) -> str:
        """Why ``homes`` cannot be loaded beside what is there; empty where they can. On a CPU each is there twice for a
        moment: as it was read, and as it is stacked."""
        sizes = [revision.sizes.get(home_of(home), 0) for home in homes]
        needed, free = (
            sum(sizes) + (max(sizes, default=0) if self._device.type == "cpu" else 0),
            free_bytes(self._device),
        )
        if free is None or needed <= free:
            return ""
        return f"its new homes need {gib(needed)} besides what is served, and {self._device.type} has {gib(free)} left"

    async def release(self, number: int) -> None:
        loop = self._running()
        await self._wait([loop.change(home, None) for home in loop.drop(number)])

    def health(self) -> EngineHealth:
        if self._loop is None:
            homes = dict.fromkeys(self._first.homes, "not loaded yet")
            return EngineHealth(alive=False, revisions={self._first.number: RevisionHealth(homes)})
        return self._loop.health()

    async def ping(self) -> None:
        await self._wait([self._running().come_round()])

    async def stop(self) -> None:
        """Requests still running or waiting get EngineStopped."""
        if self._loop is not None and self._loop.ask_to_stop():
            await asyncio.to_thread(self._reader.close)
            self._grammars.close()
            await asyncio.to_thread(self._loop.join)

    async def _load_all(self, homes: Iterable[str]) -> None:
        """One after the other; what fails is recorded."""
        loop = self._running()
        for home in homes:
            try:
                loaded = await asyncio.to_thread(self._load, home)
            except Exception as error:
                logger.warning("home %s cannot be loaded: %s", home, error)
                loop.record_failure(home, error)
                continue
            for slot, why in loaded.failed.items():
                logger.warning("slot %d of home %s is unavailable: %s", slot, home, why)
            if (before := loop.failed_of(home)) is not None and loaded.failed.keys() - before.keys():
                continue  # more is resident than can be read now
            await self._wait([loop.change(home, loaded)])

    async def _wait(self, changes: Iterable[Future[None]]) -> None:
        # Shielded: cancelling the caller must not cancel a change that the engine's thread is about to make.
        await asyncio.shield(asyncio.gather(*map(asyncio.wrap_future, changes)))

    def _running(self) -> EngineLoop:
        if self._loop is None:
            raise EngineStopped("the engine is not running: it has not been started")
        return self._loop

    # Called in worker threads.

    def _load_base(self) -> BaseModel:
        if self._settings.num_threads is not None:
            torch.set_num_threads(self._settings.num_threads)
        return load_base(self._base_path, self._device, self._dtype, self._settings.max_model_len)

    def _load(self, home: str) -> LoadedHome:
        revision, serving_map = self._running().source(home)
        loaded, num_slots = revision.load_home(home_of(home)), serving_map.num_slots()[home]
        weights = self._linears.prepare(home, loaded.weights, num_slots, self._device, self._dtype)
        return LoadedHome(weights, loaded.failed)
