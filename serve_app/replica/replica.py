"""One replica of a group: it owns an engine with the base and the group's homes.

Nothing is raised from its start, but where a deploy would have it take a healthy one's place: one deployment that fails
makes the whole Serve application DEPLOY_FAILED, and requests to it hang. What failed is in ``status``, and the router
answers 503 with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve

from cluster.bundle.reading import Bundle, pinned_bundle, standing_revision
from cluster.errors import BundleError, CtsError, EngineStopped, StoreError, StoreMissing
from serve_app.arguments import VllmArguments
from serve_app.autoscaling import SEQUENCES
from serve_app.deployed import has_running_replica, is_being_deployed
from serve_app.engine.protocol import Engine, EngineHealth
from serve_app.engine.revisions import READY, Revision
from serve_app.openai.call import Call, Carried, Message, Reply, error_reply
from serve_app.openai.errors import invalid, unavailable
from serve_app.placement import count_needs, home_sizes, homes_by_group
from serve_app.replica.answering import Answers, EngineAnswers
from serve_app.replica.base_files import resolve_base
from serve_app.replica.carrier import Carriers
from serve_app.replica.keeper import Keeper
from serve_app.replica.load import LoadMeter
from serve_app.routing.following import ReplicaStatus, RouterState
from serve_app.routing.own_replicas import PLAN, STAY_S
from serve_app.supervision import Supervised
from serve_app.watchdog import Watchdog

# A sequence's last block is part empty; this is vLLM's largest on a CPU.
_KV_BLOCK_TOKENS = 128
# An answer that is not streamed is one message, and Serve takes messages of 4 MiB at most.
_MOST_ANSWER_BYTES = 3 << 20

MOST_ANCESTORS = 8
PULSE_S = 2.0
# A prompt of a whole context may take a CPU long, and nothing else comes through meanwhile.
STUCK_S = 60.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class ReplicaSpec:
    """What a replica needs to start. ``bundle`` is pinned; ``engine``, ``dtype`` and ``device`` resolved. ``revision``
    is the one that was planned for, or the one to stay at where ``follows`` is not so; ``homes``: group -> its homes in
    that one. ``plan`` names all that was deployed together; ``ready_share`` of its homes must load where another
    replica is there already."""

    name: str
    bundle: str
    revision: int
    base: str
    homes: Mapping[str, tuple[str, ...]]
    engine: str
    device: str
    dtype: str
    max_batch: int
    max_model_len: int
    num_threads: int
    headroom: float = 0.0
    follows: bool = True
    plan: str = ""
    ready_share: float = 0.0
    adapter_chat_templates: bool = True
    vllm: VllmArguments = field(default_factory=VllmArguments)


class GroupReplica:
    async def __init__(self, spec: ReplicaSpec) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = spec
        self._engine: Engine | None = None
        self._failure: Exception | None = None
        self._stuck_s = 0.0
        self._name = serve.get_replica_context().replica_id.unique_id
        self._carriers = Carriers(self._name)
        self._load = LoadMeter()
        engine: Engine | None = None
        try:
            starting = make_engine(spec)
            await starting.start()
            engine = starting
            self._answers = make_answers(spec, engine)
            self._keeper = Keeper(engine, partial(open_revision, spec))
            works = {"revisions": self._keeper.run, "pulse": self._feel_pulse, "watchdog": Watchdog().run}
            self._background = Supervised(works)
            self._engine = engine
        except Exception as error:
            logger.exception("%s did not start", spec.name)
            self._failure = error
            if engine is not None:  # its memory is another's, once this replica is replaced
                await engine.stop()
        await self._dare()

    async def _dare(self) -> None:
        """In a deploy Serve stops a replica of the one before for each new one that does not raise here: that is the
        better one unless this one has enough. Else little is better than nothing. Raises EngineStopped."""
        if not (lacking := self._lacking()):
            return
        if await asyncio.to_thread(lambda: is_being_deployed() and has_running_replica(self._spec.name)):
            if self._engine is not None:
                await self._engine.stop()
            raise EngineStopped(lacking)

    def _lacking(self) -> str:
        """Why too little of it can be served; empty where enough can."""
        if self._engine is None:
            return self._reason
        [health] = self._engine.health().revisions.values()
        num_ready = sum(state == READY for state in health.homes.values())
        if num_ready >= self._spec.ready_share * len(health.homes):
            return ""
        return (
            f"{self._spec.name} has {num_ready} of its {len(health.homes)} homes, start.ready_share is "
            f"{self._spec.ready_share:g}, and another replica serves: {health.failures()[0]}"
        )

    def record_replica_metadata(self) -> dict[str, str]:
        """Asked by Serve once, for the routers' OwnReplicas."""
        return {PLAN: self._spec.plan}

    async def answer(self, call: Call) -> Reply:
        """Whole. An error is a reply too, never raised: Ray would wrap it in a traceback of its own, log it as a
        failure of ours, and take long over it."""
        with self._load.counting(call.num_sequences):
            reply = await self._refusal(call) or await self._answers.answer(call)
        if len(reply.body) > _MOST_ANSWER_BYTES:
            return error_reply(invalid("the answer is larger than 3 MiB: ask for less, or for a stream"))
        return reply

    async def stream(self, call: Call) -> AsyncIterator[Carried | Reply | bytes]:
        """Server-sent events; a Reply instead of them where the request is refused."""
        with self._load.counting(call.num_sequences):
            if refusal := await self._refusal(call):
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

    async def status(self, router: RouterState) -> ReplicaStatus:
        """Asked by every router, all the time: which revisions they want is said on the way."""
        if self._engine is None:
            return ReplicaStatus(self._name, self._spec.plan, EngineHealth(alive=False), self._reason)
        # Of another plan's router this replica knows no revision.
        if router.plan == self._spec.plan:
            self._keeper.hear(router)
        health = self._engine.health()
        reason = "" if health.alive else "the engine died"
        return ReplicaStatus(
            self._name, self._spec.plan, health, reason, self._keeper.refused, dict(self._background.failures)
        )

    async def stay(self, plan: str) -> None:
        """Called by routers that still need this one when Serve has told it to go: it waits for its calls to end."""
        if plan == self._spec.plan:
            await asyncio.sleep(STAY_S)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve every few seconds, where groups scale."""
        return {SEQUENCES: self._load.take()}

    async def _feel_pulse(self) -> None:
        """For ever: whether the engine's loop comes round. A process that hangs says nothing by itself."""
        while True:
            assert self._engine is not None
            asked_at = asyncio.get_running_loop().time()
            ping = asyncio.ensure_future(self._engine.ping())
            while not ping.done():
                await asyncio.wait({ping}, timeout=PULSE_S)
                self._stuck_s = asyncio.get_running_loop().time() - asked_at if not ping.done() else 0.0
            with contextlib.suppress(EngineStopped):
                await ping  # what has ended is seen by itself
            await asyncio.sleep(PULSE_S)

    async def check_health(self) -> None:
        """Asked by Serve, which replaces the replica when this raises: when the engine died, or its loop has not come
        round for STUCK_S, or when a store that could not be reached kept it from starting. What trying again would not
        help is left to stand."""
        if isinstance(self._failure, StoreError):
            raise EngineStopped(self._reason)
        if self._engine is not None and not self._engine.health().alive:
            raise EngineStopped(f"{self._spec.name}: the engine died")
        if self._stuck_s > STUCK_S:
            raise EngineStopped(f"{self._spec.name}: a step has taken {self._stuck_s:.0f} s, or the engine hangs")

    async def _refusal(self, call: Call) -> Reply | None:
        """Where nothing can answer here, or only another revision of the adapter than the one that is asked for."""
        if self._engine is None:
            return error_reply(unavailable(self._reason))
        if call.adapter is None:
            return None
        try:
            here = await self._keeper.find(call.adapter, call.revision)
        except CtsError as error:
            return error_reply(unavailable(f"{self._spec.name}: {error}"))
        if here.served != call.served:
            told = f"{call.adapter} is asked for as {call.served}, and {self._spec.name} has it as {here.served}"
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
    first = open_first(spec)
    base = resolve_base(spec.base, Bundle.open(spec.bundle, first.number).manifest.base)
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
            headroom=spec.headroom,
            least_clusters=sum(home.startswith("cluster:") for home in spec.homes[spec.name]),
        )
        return VllmEngine(base, first, settings)
    from serve_app.engine.transformers.engine import TransformersEngine
    from serve_app.engine.transformers.settings import EngineSettings

    return TransformersEngine(base, first, EngineSettings(**common))


def open_first(spec: ReplicaSpec) -> Revision:
    """CURRENT's, as far as it goes; where nothing of it can be read, what it was made from, or the one that was planned
    for: routers may be serving another by now, which is taken up when they ask for it, and an engine may make room by
    what it starts with. Raises StoreError, BundleError."""
    if not spec.follows:
        return open_revision(spec, spec.revision)
    store, bundle = pinned_bundle(spec.bundle)
    number: int | None = standing_revision(store, bundle)
    for _ in range(MOST_ANCESTORS):
        if number is None:
            break
        try:
            found = open_revision(spec, number)
            if not found.homes or _loads_any(found):
                return found
            number = Bundle.open(spec.bundle, number).manifest.parent
        except (BundleError, StoreMissing) as error:
            logger.warning("%s does not start with revision %s: %s", spec.name, number, error)
            number = number - 1 if number else None  # what it was made from stands in what cannot be read
    return open_revision(spec, spec.revision)


def _loads_any(revision: Revision) -> bool:
    for home in revision.homes:
        with contextlib.suppress(BundleError, StoreError):
            revision.load_home(home)
            return True
    return False


def open_revision(spec: ReplicaSpec, number: int) -> Revision:
    bundle = Bundle.open(spec.bundle, number)
    serving_map = bundle.serving_map
    if not spec.adapter_chat_templates:
        serving_map = serving_map.with_the_bases_template()
    homes, sizes = homes_by_group(spec.homes, serving_map)[spec.name], home_sizes(bundle.manifest, spec.dtype)
    return Revision(number, serving_map, homes, bundle.load_home, sizes)


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
