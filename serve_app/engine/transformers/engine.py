"""The transformers engine: continuous batching over one base model and the homes that are resident.

One thread owns the model. Between two steps it lets in what waits outside; a step prefills a few new
requests and then decodes one token for every running one, whatever their adapters:

    request -> waiting -> (prefill) row of the batch -> (decode) token, token, ... -> chunks -> its event loop

Keys and values belong to one request's row and are dropped with it. Nothing is reused between requests, so
no prefix ever crosses served revisions.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster.bundle.reading import HomeWeights
from cluster.bundle.serving_map import ServingMap
from cluster.errors import ConfigError, EngineStopped, HomeUnavailable, ServeError
from serve_app.engine.prompt import PromptReader
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
from serve_app.engine.transformers.adapted_linear import AdaptedLinears
from serve_app.engine.transformers.base_model import BaseModel, load_base
from serve_app.engine.transformers.batch import Batch
from serve_app.engine.transformers.generation import Answer, Generation
from serve_app.engine.transformers.sampling import choose_tokens

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What one step prefills at most (a longer prompt goes alone), so that running requests do not wait long.
_PREFILL_REQUESTS = 4
_PREFILL_TOKENS = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineSettings:
    """``max_batch`` requests run at once; ``max_model_len`` bounds prompt and answer together, in tokens.

    ``num_threads`` is for torch on a CPU; None leaves torch's own choice. Raises ConfigError.
    """

    device: str = "cpu"
    dtype: str = "float32"
    max_batch: int = 32
    max_model_len: int = 2048
    num_threads: int | None = None

    def __post_init__(self) -> None:
        try:
            supported = torch.device(self.device).type in ("cpu", "cuda")
        except RuntimeError:
            supported = False
        if not supported:
            raise ConfigError(f"device is {self.device!r}, expected cpu, cuda or cuda:<index>")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}")
        for name, least in (("max_batch", 1), ("max_model_len", 2), ("num_threads", 1)):
            value = getattr(self, name)
            if not (value is None and name == "num_threads") and (type(value) is not int or value < least):
                raise ConfigError(f"{name} is {value!r}, expected an integer of at least {least}")


@dataclass(frozen=True)
class _HomeChange:
    """Between two steps: make ``weights`` resident or, where they are None, forget the home."""

    home: str
    weights: HomeWeights | None
    done: Future[None]


class TransformersEngine:
    """Implements ``serve_app.engine.protocol.Engine``. It starts once; ``generate``, ``attach`` and
    ``detach`` may be called from any event loop.

    ``load_home`` returns a home's verified weights on the CPU; it is called in a worker thread.
    """

    def __init__(
        self,
        base: Path,
        serving_map: ServingMap,
        homes: Sequence[str],
        load_home: Callable[[str], HomeWeights],
        settings: EngineSettings,
    ) -> None:
        self._base_path, self._serving_map, self._first_homes = base, serving_map, tuple(homes)
        self._load_home, self._settings = load_home, settings
        self._device, self._dtype = torch.device(settings.device), _DTYPES[settings.dtype]
        self._num_slots = serving_map.num_slots()

        # All below is shared between threads and guarded by _news, which is never held during a forward pass.
        self._news = threading.Condition()
        self._homes = dict.fromkeys(homes, "not loaded yet")
        self._waiting: deque[Generation] = deque()
        self._in_flight: Counter[str | None] = Counter()  # home -> requests waiting or running
        self._changes: list[_HomeChange] = []
        self._stopping = False
        self._end: str | None = "it has not been started"

    async def start(self) -> None:
        """Raises BaseModelError or ConfigError when the base cannot be served; a home that fails is recorded."""
        base = await asyncio.to_thread(self._load_base)
        self._reader = PromptReader(base.tokenizer, base.vocab_size, self._settings.max_model_len)
        self._linears = AdaptedLinears(base.model)
        self._batch = Batch(base, self._linears, self._device, self._settings.max_batch, self._settings.max_model_len)
        self._eos_ids = base.eos_ids
        self._eos_columns = sorted(token for token in base.eos_ids if token < base.vocab_size)
        self._end = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        for home in self._first_homes:
            try:
                await self.attach(home)
            except Exception as error:
                logger.warning("home %s is unavailable: %s", home, error)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        served = None if request.adapter is None else self._serving_map.find(request.adapter)
        with self._news:
            self._check_available(served.home if served else None)
        # A long text takes a while to tokenize; the event loop has others to serve.
        prompt_ids, max_tokens = await asyncio.to_thread(self._reader.read, request)
        loop, answers = asyncio.get_running_loop(), asyncio.Queue[Answer]()

        def deliver(answer: Answer) -> None:
            try:
                loop.call_soon_threadsafe(answers.put_nowait, answer)
            except RuntimeError:  # the loop was closed: nobody is left to read
                generation.cancelled = True

        generation = Generation(request, served, prompt_ids, max_tokens, self._reader.tokenizer, deliver)
        with self._news:
            self._check_available(generation.home)
            self._waiting.append(generation)
            self._in_flight[generation.home] += 1
            self._news.notify()
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
        with self._news:
            self._check_alive()
            if self._homes.get(home) == "ready":
                return
            self._homes[home] = "loading"
        try:
            weights = await asyncio.to_thread(self._load_weights, home)
        except Exception as error:
            with self._news:
                self._homes[home] = f"{type(error).__name__}: {error}"
            raise
        await self._change(home, weights, meanwhile="loading")

    async def detach(self, home: str) -> None:
        await self._change(home, None, meanwhile="detached; requests already running on it finish first")

    def health(self) -> EngineHealth:
        with self._news:
            num_waiting = len(self._waiting)
            return EngineHealth(
                alive=self._end is None,
                homes=dict(self._homes),
                num_running=self._in_flight.total() - num_waiting,
                num_waiting=num_waiting,
            )

    async def stop(self) -> None:
        """Requests still running or waiting get EngineStopped."""
        with self._news:
            if self._end is not None:
                return
            self._stopping = True
            self._news.notify()
        await asyncio.to_thread(self._thread.join)

    # Called from the outside's threads.

    def _load_base(self) -> BaseModel:
        if self._settings.num_threads is not None:
            torch.set_num_threads(self._settings.num_threads)
        return load_base(self._base_path, self._device, self._dtype, self._settings.max_model_len)

    def _load_weights(self, home: str) -> HomeWeights:
        weights = self._load_home(home)
        return self._linears.prepare(home, weights, self._num_slots[home], self._device, self._dtype)

    async def _change(self, home: str, weights: HomeWeights | None, meanwhile: str) -> None:
        change = _HomeChange(home, weights, Future())
        with self._news:
            self._check_alive()
            self._homes[home] = meanwhile
            self._changes.append(change)
            self._news.notify()
        # Shielded: cancelling the caller must not cancel a change that the engine's thread is about to make.
        await asyncio.shield(asyncio.wrap_future(change.done))

    def _check_alive(self) -> None:
        if self._end is not None:
            raise EngineStopped(f"the engine is not running: {self._end}")

    def _check_available(self, home: str | None) -> None:
        self._check_alive()
        state = "ready" if home is None else self._homes.get(home, "not given to this engine")
        if state != "ready":
            raise HomeUnavailable(f"home {home!r} is not being served: {state}")

    # Called from the engine's thread.

    def _run(self) -> None:
        reason = "it was stopped"
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    self._step()
        except Exception as error:
            logger.exception("the engine's step failed")
            reason = f"a step failed: {type(error).__name__}: {error}"
        self._close(reason)

    def _wait_for_work(self) -> bool:
        """Apply what came from outside; False when the engine is to stop."""
        with self._news:
            while not self._stopping:
                self._apply_changes()
                if self._waiting or self._batch.rows:
                    return True
                self._news.wait()
        return False

    def _apply_changes(self) -> None:
        """Changes of a home stay in order; one that forgets it waits until nobody runs on it."""
        kept: list[_HomeChange] = []
        for change in self._changes:
            busy = change.weights is None and self._in_flight[change.home] > 0
            if busy or any(earlier.home == change.home for earlier in kept):
                kept.append(change)
                continue
            if change.weights is None:
                self._linears.remove(change.home)
                self._homes[change.home] = "detached"
            else:
                self._linears.add(change.home, change.weights)
                self._homes[change.home] = "ready"
            change.done.set_result(None)
        self._changes = kept

    def _step(self) -> None:
        self._leave([generation for generation in self._batch.rows if generation.cancelled])
        if admitted := self._admit():
            self._advance(admitted, self._batch.prefill(admitted))
        if self._batch.rows:
            self._advance(list(self._batch.rows), self._batch.decode())

    def _admit(self) -> list[Generation]:
        """Take waiting requests, first come first served, as far as rows are free and the step stays short."""
        admitted: list[Generation] = []
        longest = 0
        with self._news:
            for generation in [waiting for waiting in self._waiting if waiting.cancelled]:
                self._waiting.remove(generation)
                self._in_flight[generation.home] -= 1
            num_free = min(self._settings.max_batch - len(self._batch.rows), _PREFILL_REQUESTS)
            while self._waiting and len(admitted) < num_free:
                longest = max(longest, len(self._waiting[0].prompt_ids))
                if admitted and longest * (len(admitted) + 1) > _PREFILL_TOKENS:
                    break
                admitted.append(self._waiting.popleft())
        return admitted

    def _advance(self, generations: list[Generation], logits: Tensor) -> None:
        """Give each of ``generations`` the next token of its row of logits (rows, V)."""
        is_finite = logits.isfinite().all(dim=-1).tolist()
        for row, generation in enumerate(generations):
            if not generation.may_end:
                logits[row, self._eos_columns] = -torch.inf
        samplings = [generation.sampling for generation in generations]
        tokens = choose_tokens(logits, samplings, [len(generation.output_ids) for generation in generations])
        answers = [
            self._answer(generation, token, finite)
            for generation, token, finite in zip(generations, tokens, is_finite, strict=True)
        ]
        ended = [
            generation
            for generation, answer in zip(generations, answers, strict=True)
            if isinstance(answer, Exception) or answer.finish_reason is not None
        ]
        # Before they are told: whoever has read the last chunk finds the row free.
        self._leave(ended)
        for generation, answer in zip(generations, answers, strict=True):
            generation.deliver(answer)

    def _answer(self, generation: Generation, token: int, is_finite: bool) -> Answer:
        if not is_finite:
            return ServeError(
                f"adapter {generation.request.adapter or self._serving_map.base_name!r}: the model's output at token "
                f"{len(generation.output_ids) + 1} is not finite; check the adapter, and whether dtype "
                f"{self._settings.dtype} is wide enough for it"
            )
        try:
            return generation.accept(token, self._eos_ids)
        except Exception as error:
            logger.exception("request %s failed", generation.request.request_id)
            return ServeError(f"request {generation.request.request_id}: {type(error).__name__}: {error}")

    def _leave(self, generations: Iterable[Generation]) -> None:
        generations = list(generations)
        self._batch.remove(generations)
        with self._news:
            self._in_flight.subtract(generation.home for generation in generations)

    def _close(self, reason: str) -> None:
        with self._news:
            self._end = reason
            left = [*self._batch.rows, *self._waiting]
            self._waiting.clear()
            self._in_flight.clear()
            changes, self._changes = self._changes, []
        # One error each: a traceback belongs to one task.
        message = f"the engine is not running: {reason}"
        for change in changes:
            change.done.set_exception(EngineStopped(message))
        for generation in left:
            generation.deliver(EngineStopped(message))
