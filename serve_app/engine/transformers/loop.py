"""The thread that owns the model: continuous batching over the homes that are resident.

Between two steps it lets in what waits outside; a step takes in a few new requests and then decodes one token for
every running one, whatever their adapters:

    request -> waiting -> (admit, prefill) row of the batch -> (decode) token, token, ... -> (deliver) its event loop
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServedAdapter, ServingMap
from cluster.errors import EngineStopped, RequestError, ServeError
from serve_app.engine.protocol import EngineHealth
from serve_app.engine.revisions import READY, Revision, Revisions
from serve_app.engine.transformers.adapted_linear import AdaptedLinears
from serve_app.engine.transformers.base_model import BaseModel
from serve_app.engine.transformers.batch import Batch
from serve_app.engine.transformers.generation import Answer, Generation
from serve_app.engine.transformers.sampling import adjust, choose_tokens
from serve_app.engine.transformers.settings import EngineSettings

# What one step prefills at most (a longer prompt goes alone), so that running requests do not wait long.
_PREFILL_REQUESTS = 4
_PREFILL_TOKENS = 512

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _HomeChange:
    """Between two steps: make ``loaded`` resident or, where it is None, forget the home."""

    home: str
    loaded: LoadedHome | None
    done: Future[None]


class EngineLoop:
    """What ``_news`` guards is shared with the outside; the model is not. Homes are named by their content."""

    def __init__(self, base: BaseModel, base_name: str, linears: AdaptedLinears, settings: EngineSettings) -> None:
        self._base_name, self._linears, self._settings = base_name, linears, settings
        device = torch.device(settings.device)
        self._batch = Batch(base, linears, device, settings.max_batch, settings.max_model_len)
        self._eos_ids = base.eos_ids
        self._eos_columns = sorted(token for token in base.eos_ids if token < base.vocab_size)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

        # All below is shared between threads and guarded by _news, which is never held during a forward pass.
        self._news = threading.Condition()
        self._revisions = Revisions()
        self._waiting: deque[Generation] = deque()
        self._in_flight: Counter[str | None] = Counter()  # home -> requests waiting or running
        self._changes: list[_HomeChange] = []
        self._pings: list[Future[None]] = []
        self._stopping = False
        self._end: str | None = None

    # Called from the outside's threads.

    def start(self) -> None:
        self._thread.start()

    def submit(self, generation: Generation) -> None:
        """It waits until a step admits it. Raises EngineStopped, HomeUnavailable."""
        with self._news:
            self._check_available(generation.served)
            self._waiting.append(generation)
            self._in_flight[generation.home] += 1
            self._news.notify()

    def check_available(self, served: ServedAdapter | None) -> None:
        """Raises EngineStopped, and HomeUnavailable where the adapter (None: the base) cannot be asked."""
        with self._news:
            self._check_available(served)

    def hold(self, revision: Revision) -> list[str]:
        """As ``Revisions.hold``. Raises EngineStopped."""
        with self._news:
            self._check_alive()
            return self._revisions.hold(revision)

    def confirm(self, number: int) -> None:
        """As ``Revisions.confirm``."""
        with self._news:
            self._revisions.confirm(number)

    def drop(self, number: int) -> list[str]:
        """As ``Revisions.drop``. Raises EngineStopped."""
        with self._news:
            self._check_alive()
            return self._revisions.drop(number)

    def find(self, adapter_id: str, number: int | None) -> ServedAdapter:
        """As ``Revisions.find``."""
        with self._news:
            return self._revisions.find(adapter_id, number)

    def source(self, home: str) -> tuple[Revision, ServingMap]:
        """As ``Revisions.source``."""
        with self._news:
            return self._revisions.source(home)

    def newly_failed(self, number: int) -> list[str]:
        """As ``Revisions.newly_failed``."""
        with self._news:
            return self._revisions.newly_failed(number)

    def failed_of(self, home: str) -> Mapping[int, str] | None:
        """As ``Revisions.failed_of``."""
        with self._news:
            return self._revisions.failed_of(home)

    def record_failure(self, home: str, error: Exception) -> None:
        """As ``Revisions.record_failure``."""
        with self._news:
            self._revisions.record_failure(home, error)

    def change(self, home: str, loaded: LoadedHome | None) -> Future[None]:
        """Between two steps: make ``loaded`` resident, or forget the home where it is None, once nobody runs on it. One
        that comes again is not forgotten any more. Raises EngineStopped."""
        change = _HomeChange(home, loaded, Future())
        with self._news:
            self._check_alive()
            if loaded is not None:
                for earlier in [own for own in self._changes if own.home == home and own.loaded is None]:
                    self._changes.remove(earlier)
                    earlier.done.set_result(None)
            self._changes.append(change)
            self._news.notify()
        return change.done

    def come_round(self) -> Future[None]:
        """Done between two steps. Raises EngineStopped."""
        done = Future[None]()
        with self._news:
            self._check_alive()
            self._pings.append(done)
            self._news.notify()
        return done

    def health(self) -> EngineHealth:
        with self._news:
            num_waiting = len(self._waiting)
            return EngineHealth(
                alive=self._end is None,
                revisions=self._revisions.health(),
                num_running=self._in_flight.total() - num_waiting,
                num_waiting=num_waiting,
            )

    def ask_to_stop(self) -> bool:
        """Requests still running or waiting will get EngineStopped. False where it has ended already."""
        with self._news:
            self._stopping = True
            self._news.notify()
            return self._end is None

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def _check_alive(self) -> None:
        if self._end is not None:
            raise EngineStopped(f"the engine is not running: {self._end}")

    def _check_available(self, served: ServedAdapter | None) -> None:
        self._check_alive()
        self._revisions.check(served)

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
        for ping in self._pings:
            ping.set_result(None)
        self._pings.clear()
        kept: list[_HomeChange] = []
        for change in self._changes:
            busy = change.loaded is None and self._in_flight[change.home] > 0
            if busy or any(earlier.home == change.home for earlier in kept):
                kept.append(change)
                continue
            if change.loaded is None:
                self._linears.remove(change.home)
                self._revisions.forget(change.home)
            else:
                self._linears.add(change.home, change.loaded.weights)
                self._revisions.record(change.home, READY, change.loaded.failed)
            change.done.set_result(None)
        self._changes = kept

    def _step(self) -> None:
        """Let go who was cancelled; admit and prefill; decode; deliver each token to its owner."""
        self._leave([generation for generation in self._batch.rows if generation.cancelled])
        if admitted := self._admit():
            self._deliver(admitted, self._batch.prefill(admitted))
        if self._batch.rows:
            self._deliver(list(self._batch.rows), self._batch.decode())

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

    def _deliver(self, generations: list[Generation], logits: Tensor) -> None:
        """Draw the next token of each of ``generations`` from its row of logits (rows, V), and tell its owner."""
        is_finite = logits.isfinite().all(dim=-1).tolist()
        told = [
            row.log_softmax(-1) if generation.request.logprobs is not None else None
            for row, generation in zip(logits, generations, strict=True)
        ]
        for row, generation in enumerate(generations):
            adjust(logits[row], generation.request, generation.prompt_ids, generation.output_ids)
            if generation.grammar is not None:
                generation.grammar.restrict(logits[row])
            if not generation.may_end:
                logits[row, [*self._eos_columns, *generation.request.stop_token_ids]] = -torch.inf
        samplings = [generation.sampling for generation in generations]
        tokens = choose_tokens(logits, samplings, [len(generation.output_ids) for generation in generations])
        answers = [
            self._answer(generation, token, finite, log_probs)
            for generation, token, finite, log_probs in zip(generations, tokens, is_finite, told, strict=True)
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

    def _answer(self, generation: Generation, token: int, is_finite: bool, log_probs: Tensor | None) -> Answer:
        if not is_finite:
            return ServeError(
                f"adapter {generation.request.adapter or self._base_name!r}: the model's output at token "
                f"{len(generation.output_ids) + 1} is not finite; check the adapter, and whether dtype "
                f"{self._settings.dtype} is wide enough for it"
            )
        try:
            return generation.accept(token, self._eos_ids, log_probs)
        except RequestError as error:
            return error
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
            unmet = [*self._pings, *(change.done for change in self._changes)]
            self._pings, self._changes = [], []
        # One error each: a traceback belongs to one task.
        message = f"the engine is not running: {reason}"
        for done in unmet:
            done.set_exception(EngineStopped(message))
        for generation in left:
            generation.deliver(EngineStopped(message))
