"""The vLLM engine: vLLM's own scheduler, cache and kernels, with this project's plugin in its LoRA layers.

    request -> prompt read here -> vLLM's AsyncLLM, in which the adapter is a LoRA request that names its place
            -> vLLM's own sampling and detokenizing -> chunks

All homes of the revisions that are held are resident, so that no adapter is ever loaded for a request. A request for a
home that is not there could end vLLM's process: it is refused here, before it. vLLM has as many slots as a batch has
rows, so that no batch holds more distinct adapters than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.bundle.reading import HomeWeights, LoadedHome
from cluster.bundle.serving_map import ServedAdapter, home_of
from cluster.errors import BaseModelError, BundleError, ConfigError, EngineStopped, RequestError
from cluster.layer import ModuleWeights
from serve_app.engine.prompt import PromptReader
from serve_app.engine.protocol import EngineHealth, GenerationChunk, GenerationRequest
from serve_app.engine.revisions import READY, Revision, Revisions, refusal
from serve_app.engine.vllm.options import WORKER, VllmSettings, base_options, home_options
from serve_app.engine.vllm.plugin import compatibility, parent
from serve_app.engine.vllm.plugin.home_file import write_home
from serve_app.engine.vllm.plugin.token_index import write_path

logger = logging.getLogger(__name__)


class VllmEngine:
    """Implements ``serve_app.engine.protocol.Engine``. It starts once and belongs to one event loop. Homes are named by
    their content."""

    def __init__(self, base: Path, first: Revision, settings: VllmSettings) -> None:
        self._base_path, self._settings = base, settings
        self._revisions = Revisions()
        self._first_homes, self._first_map = self._revisions.hold(first), first.serving_map.by_content()
        self._first_number = first.number
        # vLLM knows LoRAs by a positive number, and takes two of one name for the same. So a number is a name's, which
        # is an adapter and its served revision, whatever homes have it; where that is is in the request itself. None is
        # forgotten: while a request with it runs, another number for its name would end vLLM's process.
        self._ids: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._in_flight: Counter[str | None] = Counter()
        self._left = asyncio.Condition()
        self._request_numbers = itertools.count()
        self._llm: Any = None
        self._end: str | None = "it has not been started"

    async def start(self) -> None:
        """Raises ConfigError and BaseModelError when the base cannot be served; a home that fails is recorded."""
        compatibility.check()
        loaded = await self._load_all(self._first_homes)
        try:
            self._llm, tokenizer = await asyncio.to_thread(self._make_llm, loaded)
        except (ConfigError, BaseModelError):
            raise
        except Exception as error:
            raise BaseModelError(
                f"base model {self._base_path}: vLLM did not start: {type(error).__name__}: {error}; "
                "its own log says more"
            ) from error
        vocab_size = self._llm.model_config.get_vocab_size()
        self._reader = PromptReader(tokenizer, vocab_size, self._settings.max_model_len)
        self._end = None
        for home, own in loaded.items():
            await self._hand_over(home, own)
        self._revisions.confirm(self._first_number)

    def find(self, adapter_id: str, revision: int | None = None) -> ServedAdapter:
        return self._revisions.find(adapter_id, revision)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        served = None if request.adapter is None else self.find(request.adapter, request.revision)
        self._check_available(served)
        template = served.chat_template if served else None
        prompt_ids, max_tokens = await self._reader.read_aside(request, template)
        # A number of our own before the client's: two clients may use the same id.
        request_id = f"{next(self._request_numbers)}-{request.request_id}"
        async with self.holding(served):
            outputs = self._llm.generate(
                {"prompt_token_ids": prompt_ids},
                self._sampling(request, max_tokens),
                request_id,
                lora_request=self.lora_request(served),
            )
            try:
                async with contextlib.aclosing(outputs):
                    num_tokens = 0
                    async for output in outputs:
                        answer = output.outputs[0]
                        num_tokens += len(answer.token_ids)
                        if answer.finish_reason not in (None, "stop", "length"):
                            raise EngineStopped(f"the engine ended the request: {answer.finish_reason}")
                        yield GenerationChunk(
                            answer.text, tuple(answer.token_ids), len(prompt_ids), num_tokens, answer.finish_reason
                        )
            except Exception as error:
                raise self._translated(error) from error

    @contextlib.asynccontextmanager
    async def holding(self, served: ServedAdapter | None, num_sequences: int = 1) -> AsyncGenerator[None, None]:
        """Its home stays while this lasts, and so many sequences count as in flight. Raises EngineStopped, and
        HomeUnavailable where it cannot be asked."""
        self._check_available(served)
        home = served.home if served else None
        self._in_flight[home] += num_sequences
        try:
            yield
        finally:
            self._in_flight[home] -= num_sequences
            async with self._left:
                self._left.notify_all()

    @property
    def base_name(self) -> str:
        return self._first_map.base_name

    @property
    def llm(self) -> Any:
        """vLLM's AsyncLLM. What is asked of it with an adapter is asked within ``holding``."""
        return self._llm

    @property
    def end(self) -> str | None:
        """Why the engine answers no more."""
        return self._end or ("vLLM ended; its log says why" if self._llm.errored else None)

    def special_stops(self, stops: Sequence[str]) -> tuple[int, ...]:
        """As ``PromptReader.special_stops``."""
        return self._reader.special_stops(stops)

    def render(self, template: str, messages: list[dict[str, Any]]) -> str:
        """A chat through an adapter's own template, in a process apart. Raises RequestError."""
        return self._reader.templates.render(template, messages, dict(self._reader.tokenizer.special_tokens_map))

    async def take_up(self, revision: Revision) -> None:
        self._check_alive()
        known = revision.number in self._revisions.health()
        for home, own in (await self._load_all(self._revisions.hold(revision))).items():
            await self._hand_over(home, own)
        if not known and (told := self._revisions.newly_failed(revision.number)):
            await self.release(revision.number)
            raise refusal(revision.number, told)
        self._revisions.confirm(revision.number)

    async def release(self, number: int) -> None:
        self._check_alive()
        for home in self._revisions.drop(number):
            await self._detach(home)

    def health(self) -> EngineHealth:
        alive = self._end is None and not self._llm.errored
        running = min(self._in_flight.total(), self._settings.max_batch)
        return EngineHealth(alive, self._revisions.health(), running, self._in_flight.total() - running)

    async def ping(self) -> None:
        self._check_alive()
        await self._llm.collective_rpc("ping")

    async def stop(self) -> None:
        """Requests still running or waiting get EngineStopped."""
        if self._end is None:
            self._end = "it was stopped"
            await asyncio.to_thread(self._reader.close)
            await asyncio.to_thread(self._llm.shutdown)

    async def resident_bytes(self) -> int:
        """Bytes of all adapters, over all of the engine's devices."""
        return sum(await self._llm.collective_rpc("resident_bytes"))

    # Homes.

    async def _detach(self, home: str) -> None:
        async with self._left:
            # A request of a home that is gone would end vLLM's process at its next step.
            await self._left.wait_for(lambda: self._in_flight[home] == 0)
        if self._revisions.has(home):
            return  # again, by a revision that came meanwhile
        await self._llm.collective_rpc("detach_home", args=(home,))
        self._revisions.forget(home)
        del self._in_flight[home]

    async def _load_all(self, homes: Iterable[str]) -> dict[str, LoadedHome]:
        """What can be loaded of them; what fails is recorded."""
        loaded = {}
        for home in homes:
            revision, serving_map = self._revisions.source(home)
            members, num_slots = serving_map.members(home), serving_map.num_slots()[home]
            try:
                own = await asyncio.to_thread(revision.load_home, home_of(home))
                loaded[home] = await asyncio.to_thread(_checked, home_of(home), own, members, num_slots)
            except Exception as error:
                self._failed(home, error)
                continue
            for slot, why in loaded[home].failed.items():
                logger.warning("slot %d of home %s is unavailable: %s", slot, home, why)
        return loaded

    async def _hand_over(self, home: str, loaded: LoadedHome) -> None:
        """Into every worker; what fails is recorded. What is there of it already stays."""
        if not self._has_room:
            # vLLM was started without adapters, because of none of them was there anything to read.
            self._end = "none of its homes could be read when it started, and now one can; it is to be started anew"
            return
        _, serving_map = self._revisions.source(home)
        served = {
            slot: serving_map.adapters[adapter_id].served
            for slot, adapter_id in serving_map.members(home).items()
            if slot not in loaded.failed
        }
        before = self._revisions.failed_of(home)
        try:
            with tempfile.TemporaryDirectory(prefix="cts-home-") as folder:
                await asyncio.to_thread(write_home, Path(folder), loaded.weights)
                answers = await self._llm.collective_rpc("attach_home", args=(home, folder, served))
            if failures := [answer for answer in answers if answer is not None]:
                if before is None:
                    await self._llm.collective_rpc("detach_home", args=(home,))
                raise BundleError(failures[0])
        except Exception as error:
            self._failed(home, error)
        else:
            failed = loaded.failed if before is None else {s: why for s, why in loaded.failed.items() if s in before}
            self._revisions.record(home, READY, failed)

    def _failed(self, home: str, error: Exception) -> None:
        logger.warning("home %s cannot be loaded: %s", home, error)
        self._revisions.record_failure(home, error)

    # vLLM.

    def _make_llm(self, loaded: Mapping[str, LoadedHome]) -> tuple[Any, Any]:
        settings = self._settings
        shared = base_options(self._base_path, settings)
        parent.announce()
        from transformers import AutoTokenizer
        from vllm import AsyncEngineArgs
        from vllm.config import StructuredOutputsConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        from serve_app.engine.vllm import detokenizer

        if not self._base_path.is_dir():
            raise BaseModelError(f"base model {self._base_path}: no such folder; expected one that transformers loads")
        weights = {home: own.weights for home, own in loaded.items()}
        # Without homes too, for `ping`.
        options: dict[str, Any] = {"worker_extension_cls": WORKER}
        self._has_room = bool(weights)
        if weights:
            options |= home_options(weights, self._first_homes, self._first_map, settings)
        tokenizer = AutoTokenizer.from_pretrained(self._base_path, local_files_only=True, trust_remote_code=False)
        if backend := shared.pop("structured_outputs_backend", None):
            shared["structured_outputs_config"] = StructuredOutputsConfig(backend=backend)
        args = AsyncEngineArgs(**shared, **options)
        detokenizer.rebind()
        return AsyncLLM.from_engine_args(args), tokenizer

    def lora_request(self, served: ServedAdapter | None) -> Any:
        """What tells vLLM an adapter's place; None for the base."""
        if served is None:
            return None
        from vllm.lora.request import LoRARequest

        # The served revision is in the name, which is part of the prefix cache's key: what was computed by one
        # revision of an adapter is never reused by another.
        name = f"{served.adapter_id}@{served.served}"
        if name not in self._ids:
            self._ids[name] = next(self._numbers)
        return LoRARequest(
            lora_name=name,
            lora_int_id=self._ids[name],
            lora_path=write_path(home_of(served.home), served.served),
        )

    @staticmethod
    def _sampling(request: GenerationRequest, max_tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            min_p=request.min_p,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            repetition_penalty=request.repetition_penalty,
            logit_bias=dict(request.logit_bias) or None,
            stop_token_ids=list(request.stop_token_ids) or None,
            # vLLM's seeds are signed 64-bit numbers.
            seed=None if request.seed is None else request.seed & (2**63 - 1),
            stop=list(request.stop) or None,
            min_tokens=request.min_tokens,
            max_tokens=max_tokens,
            ignore_eos=request.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )

    def _check_alive(self) -> None:
        if self._end is None and self._llm.errored:
            self._end = "vLLM's process ended; its log says why"
        if self._end is not None:
            raise EngineStopped(f"the engine is not running: {self._end}")

    def _check_available(self, served: ServedAdapter | None) -> None:
        self._check_alive()
        self._revisions.check(served)

    def _translated(self, error: Exception) -> Exception:
        if isinstance(error, EngineStopped):
            return error
        if self._end is not None or self._llm.errored:
            return EngineStopped(f"the engine is not running: {self._end or 'vLLM ended; its log says why'}")
        if isinstance(error, ValueError):
            return RequestError(str(error), None)
        return EngineStopped(f"vLLM: {type(error).__name__}: {error}")


def _checked(home: str, loaded: LoadedHome, members: Mapping[int, str], num_slots: int) -> LoadedHome:
    """The same, without the adapters of a stack that are not finite. ``members`` and ``num_slots`` as the serving map
    has them. Raises BundleError.

    vLLM samples from whatever comes out; nothing behind this check would notice.
    """
    weights: HomeWeights = {}
    failed = dict(loaded.failed)
    for module, own in loaded.weights.items():
        if own.num_slots < num_slots:
            raise BundleError(
                f"home {home!r}: {own.num_slots} slots at module {module!r}, the serving map has {num_slots}"
            )
        weights[module] = own
        for part, tensor in (("U", own.U), ("V", own.V), ("cores", own.cores)):
            # A sum is not finite if a number in it is not, and takes a tenth of the time of a look at each.
            if tensor is None or tensor.sum(dtype=torch.float32).isfinite() or tensor.isfinite().all():
                continue
            if own.rows is None:
                raise BundleError(f"home {home!r}: {part} of module {module!r} is not finite; compress it anew")
            finite = torch.isfinite(tensor).flatten(1).all(dim=1)
            weights[module], slots = _without(weights[module], ~finite)
            told = f"{'B' if part == 'U' else 'A'} of module {module!r} is not finite; compress it anew"
            failed |= {slot: f"BundleError: adapter {members.get(slot)!r}: {told}" for slot in slots}
    if failed.keys() >= members.keys() and failed:
        raise BundleError(f"home {home!r}: {next(iter(failed.values())).partition(': ')[2]}")
    return LoadedHome(weights, failed)


def _without(stack: ModuleWeights, rows: Tensor) -> tuple[ModuleWeights, list[int]]:
    """The stack with none of the slots that stand on ``rows`` (m,) bool, and those slots."""
    assert stack.rows is not None
    gone = rows[stack.rows]
    kept = torch.where(gone, len(stack.U) - 1, stack.rows)
    return replace(stack, rows=kept), gone.nonzero()[:, 0].tolist()
