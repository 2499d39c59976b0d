"""One replica of a group: it owns an engine with the base and the group's homes.

Nothing is raised from its start: one deployment that fails makes the whole Serve application DEPLOY_FAILED,
and requests to it hang. What failed is in ``status``, and the router answers 503 with it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bundle.reading import Bundle
from cluster.errors import CtsError, EngineStopped, StoreError
from serve_app.arguments import VllmArguments
from serve_app.engine.protocol import Engine, EngineHealth
from serve_app.openai.call import Call, Carried, Message, Reply, error_reply
from serve_app.openai.errors import invalid, unavailable
from serve_app.placement import count_needs
from serve_app.replica.answering import Answers, EngineAnswers
from serve_app.replica.base_files import resolve_base
from serve_app.replica.carrier import Carriers

# A sequence's last block is part empty; this is vLLM's largest on a CPU.
_KV_BLOCK_TOKENS = 128
# An answer that is not streamed is one message, and Serve takes messages of 4 MiB at most.
_MOST_ANSWER_BYTES = 3 << 20

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica needs to start. ``bundle`` and ``revision`` are pinned; ``engine``, ``dtype``
    and ``device`` resolved."""

    name: str
    bundle: str
    revision: int
    base: str
    homes: tuple[str, ...]
    engine: str
    device: str
    dtype: str
    max_batch: int
    max_model_len: int
    num_threads: int
    adapter_chat_templates: bool = True
    vllm: VllmArguments = field(default_factory=VllmArguments)


class GroupReplica:
    async def __init__(self, spec: ReplicaSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = spec
        self._engine: Engine | None = None
        self._failure: Exception | None = None
        self._carriers = Carriers()
        engine: Engine | None = None
        try:
            starting = make_engine(spec)
            await starting.start()
            engine = starting
            self._answers = make_answers(spec, engine)
            self._engine = engine
        except Exception as error:
            logger.exception("%s did not start", spec.name)
            self._failure = error
            if engine is not None:  # its memory is another's, once this replica is replaced
                await engine.stop()

    async def answer(self, call: Call) -> Reply:
        """Whole. An error is a reply too, never raised: Ray would wrap it in a traceback of its own, log it as a
        failure of ours, and take long over it."""
        reply = self._refusal(call) or await self._answers.answer(call)
        if len(reply.body) > _MOST_ANSWER_BYTES:
            return error_reply(invalid("the answer is larger than 3 MiB: ask for less, or for a stream"))
        return reply

    async def stream(self, call: Call) -> AsyncIterator[Carried | Reply | bytes]:
        """Server-sent events; a Reply instead of them where the request is refused."""
        if refusal := self._refusal(call):
            yield refusal
            return
        async with aclosing(self._carriers.send(call, self._answers.stream(call))) as pieces:
            async for piece in pieces:
                yield piece

    async def carry(self, router: str) -> AsyncIterator[Message]:
        """What streams of this router say after their first piece, for as long as it is in use."""
        async with aclosing(self._carriers.carry(router)) as messages:
            async for message in messages:
                yield message

    async def status(self) -> EngineHealth:
        if self._engine is None:
            return EngineHealth(alive=False, homes=dict.fromkeys(self._spec.homes, self._reason))
        return self._engine.health()

    async def check_health(self) -> None:
        """Asked by Serve, which replaces the replica when this raises: when the engine died, or when a store
        that could not be reached kept it from starting. What trying again would not help is left to stand."""
        if isinstance(self._failure, StoreError):
            raise EngineStopped(self._reason)
        if self._engine is not None and not self._engine.health().alive:
            raise EngineStopped(f"{self._spec.name}: the engine died")

    def _refusal(self, call: Call) -> Reply | None:
        """Where nothing can answer here, or only another revision of the adapter than the one that is asked for."""
        if self._engine is None:
            return error_reply(unavailable(self._reason))
        if call.adapter is None:
            return None
        here = self._engine.serving_map.adapters.get(call.adapter)
        if here is None or here.served != call.served:
            own = "has no such adapter" if here is None else f"serves its revision {here.served}"
            told = f"{call.adapter} is asked for at revision {call.served}, and {self._spec.name} {own}; try again"
            return error_reply(unavailable(told))
        return None

    @property
    def _reason(self) -> str:
        # Only our own errors are written for a client's eyes.
        said = str(self._failure) if isinstance(self._failure, CtsError) else "see the replica's log"
        return f"{self._spec.name} did not start: {said}"


def make_engine(spec: ReplicaSpec) -> Engine:
    """Opens the bundle and brings the base's files here; loads neither."""
    # Imported here, because the application's builder imports this file and needs no model library.
    bundle = Bundle.open(spec.bundle, spec.revision)
    base = resolve_base(spec.base, bundle.manifest.base)
    serving_map = bundle.serving_map
    if not spec.adapter_chat_templates:
        serving_map = serving_map.with_the_bases_template()
    common: dict[str, Any] = {
        "device": spec.device,
        "dtype": spec.dtype,
        "max_batch": spec.max_batch,
        "max_model_len": spec.max_model_len,
        "num_threads": spec.num_threads,
    }
    if spec.engine == "vllm":
        from serve_app.engine.vllm.engine import VllmEngine
        from serve_app.engine.vllm.options import VllmSettings

        kv_bytes = _kv_bytes(base, spec) if spec.device == "cpu" else None
        settings = VllmSettings(
            **common,
            kv_bytes=kv_bytes,
            reasoning_parser=spec.vllm.reasoning_parser,
            structured_outputs_backend=spec.vllm.structured_outputs_backend,
        )
        return VllmEngine(base, serving_map, spec.homes, bundle.load_home, settings)
    from serve_app.engine.transformers.engine import TransformersEngine
    from serve_app.engine.transformers.settings import EngineSettings

    return TransformersEngine(base, serving_map, spec.homes, bundle.load_home, EngineSettings(**common))


def make_answers(spec: ReplicaSpec, engine: Engine) -> Answers:
    if spec.engine != "vllm":
        return EngineAnswers(engine)
    from serve_app.engine.vllm.engine import VllmEngine
    from serve_app.replica.vllm_answers import VllmAnswers

    assert isinstance(engine, VllmEngine)
    return VllmAnswers(engine, spec.vllm)


def _kv_bytes(base: Path, spec: ReplicaSpec) -> int:
    """Keys and values of a full batch, as the placement counts them, in vLLM's blocks."""
    config = json.loads((base / "config.json").read_text())
    needs = count_needs(config, 0, spec.dtype, spec.max_batch + 1, spec.max_model_len + _KV_BLOCK_TOKENS)
    return needs.kv_bytes
