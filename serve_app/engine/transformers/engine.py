"""The transformers engine: one base model and the homes that are resident, asked from any event loop.

Keys and values belong to one request's row and are dropped with it. Nothing is reused between requests, so
no prefix ever crosses served revisions. The model itself belongs to the loop's thread (loop.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServingMap
from cluster.errors import EngineStopped
from serve_app.engine.home_states import HomeStates
from serve_app.engine.prompt import PromptReader
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
from serve_app.engine.transformers.adapted_linear import AdaptedLinears
from serve_app.engine.transformers.base_model import BaseModel, load_base
from serve_app.engine.transformers.generation import Answer, Generation
from serve_app.engine.transformers.grammar import Grammars
from serve_app.engine.transformers.loop import EngineLoop
from serve_app.engine.transformers.settings import DTYPES, EngineSettings

logger = logging.getLogger(__name__)


class TransformersEngine:
    """Implements ``serve_app.engine.protocol.Engine``. It starts once; ``generate``, ``attach`` and
    ``detach`` may be called from any event loop.

    ``load_home`` returns a home's verified weights on the CPU, and which of its adapters failed; it is called in a
    worker thread.
    """

    def __init__(
        self,
        base: Path,
        serving_map: ServingMap,
        homes: Sequence[str],
        load_home: Callable[[str], LoadedHome],
        settings: EngineSettings,
    ) -> None:
        self._base_path, self._serving_map, self._first_homes = base, serving_map, tuple(homes)
        self._load_home, self._settings = load_home, settings
        self._device, self._dtype = torch.device(settings.device), DTYPES[settings.dtype]
        self._num_slots = serving_map.num_slots()
        self._loop: EngineLoop | None = None

    @property
    def serving_map(self) -> ServingMap:
        return self._serving_map

    async def start(self) -> None:
        """Raises BaseModelError or ConfigError when the base cannot be served; a home that fails is recorded."""
        base = await asyncio.to_thread(self._load_base)
        self._reader = PromptReader(base.tokenizer, base.vocab_size, self._settings.max_model_len)
        self._grammars = Grammars(base.tokenizer, base.eos_ids)
        self._linears = AdaptedLinears(base.model)
        states = HomeStates(self._first_homes, self._serving_map)
        self._loop = EngineLoop(base, self._serving_map.base_name, self._linears, states, self._settings)
        self._loop.start()
        for home in self._first_homes:
            try:
                await self.attach(home)
            except Exception as error:
                logger.warning("home %s is unavailable: %s", home, error)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        served = None if request.adapter is None else self._serving_map.find(request.adapter)
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

    async def attach(self, home: str) -> None:
        loop = self._running()
        if not loop.begin_loading(home):
            return
        try:
            loaded = await asyncio.to_thread(self._load, home)
        except Exception as error:
            loop.loading_failed(home, f"{type(error).__name__}: {error}")
            raise
        for slot, why in loaded.failed.items():
            logger.warning("slot %d of home %s is unavailable: %s", slot, home, why)
        await self._change(home, loaded, meanwhile="loading")

    async def detach(self, home: str) -> None:
        await self._change(home, None, meanwhile="detached; requests already running on it finish first")

    def health(self) -> EngineHealth:
        if self._loop is None:
            return EngineHealth(alive=False, homes=dict.fromkeys(self._first_homes, "not loaded yet"))
        return self._loop.health()

    async def stop(self) -> None:
        """Requests still running or waiting get EngineStopped."""
        if self._loop is not None and self._loop.ask_to_stop():
            await asyncio.to_thread(self._reader.close)
            self._grammars.close()
            await asyncio.to_thread(self._loop.join)

    async def _change(self, home: str, loaded: LoadedHome | None, meanwhile: str) -> None:
        done = self._running().change(home, loaded, meanwhile)
        # Shielded: cancelling the caller must not cancel a change that the engine's thread is about to make.
        await asyncio.shield(asyncio.wrap_future(done))

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
        loaded = self._load_home(home)
        weights = self._linears.prepare(home, loaded.weights, self._num_slots[home], self._device, self._dtype)
        return LoadedHome(weights, loaded.failed)
