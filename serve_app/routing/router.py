"""The router: the model field names an adapter, the serving map its home, the placement the home's group;
that group's replicas generate. ``serve_app.http.routes`` has the routes to it.

Every call has a deadline, and an answer by itself where a group cannot give one. It does no model work.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from cluster.bundle.reading import Bundle
from cluster.bundle.serving_map import ServedAdapter, ServingMap
from cluster.errors import BundleError, StoreError
from serve_app.engine.protocol import GenerationChunk
from serve_app.openai.answers import Answer, Answering, ModelCard, ModelPage, adapter_card, base_card, page
from serve_app.openai.errors import as_api_error, invalid, unavailable, unknown_model
from serve_app.openai.requests import ChatRequest, GenerationFields
from serve_app.routing.groups import READY, GroupClient

DEFAULT_PAGE, MAX_PAGE = 1000, 10_000
RETRY_MAP_S = 5.0
IndexedChunks = AsyncGenerator[tuple[int, GenerationChunk], None]

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class RouterSpec:
    """``homes`` is group -> the homes it holds."""

    bundle: str
    revision: int
    homes: Mapping[str, tuple[str, ...]]
    max_inflight: int
    max_prompts: int
    request_timeout_s: float


@dataclass(frozen=True)
class LoadedMap:
    """The serving map and what the router says about it. ``model_ids`` are sorted, the base among them."""

    serving_map: ServingMap
    base_fingerprint: str
    model_ids: tuple[str, ...]
    loaded_at: int


class Router:
    def __init__(self, spec: RouterSpec, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._spec = spec
        self._groups = {
            name: GroupClient(name, homes, handles[name], spec.max_inflight) for name, homes in spec.homes.items()
        }
        self._group_of = {home: group for group in self._groups.values() for home in group.homes}
        self._map: LoadedMap | None = None
        self._map_failure = "it is being loaded"
        # Held, because the event loop itself holds its tasks only weakly.
        watches = [group.watch() for group in self._groups.values()]
        self._tasks = [asyncio.create_task(work) for work in (self._load_map(), *watches)]

    async def answer(self, request: GenerationFields) -> Response:
        """A completion or a chat, whole or as a stream."""
        adapter = self._find(request.model)
        group = self._choose_group(adapter)
        served = adapter.served if adapter else self._loaded().base_fingerprint
        chat = isinstance(request, ChatRequest)
        answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}"
        requests = request.generations(answer_id, adapter.adapter_id if adapter else None)
        if len(requests) > self._spec.max_prompts:
            raise invalid(f"prompt holds {len(requests)} prompts, at most {self._spec.max_prompts} a request", "prompt")
        answering = Answering(answer_id, request.model, served, chat, len(requests), request.include_usage)
        headers = {"X-Served-Revision": served, "X-Cluster": _cluster_header(adapter)}
        deadline = asyncio.get_running_loop().time() + self._spec.request_timeout_s
        chunks = _until(deadline, group.generate(requests))
        if request.stream:
            return await _stream(chunks, answering, headers)
        async with aclosing(chunks):
            async for index, chunk in chunks:
                answering.add(index, chunk)
        return as_json(answering.whole(), headers)

    def list_models(self, query: Mapping[str, str]) -> ModelPage:
        """The page that ``limit`` and ``after`` ask for."""
        if unknown := set(query) - {"limit", "after"}:
            raise invalid(f"Unknown parameter {min(unknown)!r}; known are limit and after", min(unknown))
        limit = query.get("limit", str(DEFAULT_PAGE))
        if not (re.fullmatch(r"[0-9]{1,9}", limit) and 1 <= int(limit) <= MAX_PAGE):
            raise invalid(f"limit is {limit[:100]!r}, expected a number from 1 to {MAX_PAGE}", "limit")
        ids, has_more = page(self._loaded().model_ids, query.get("after"), int(limit))
        cards = [self.card(model_id) for model_id in ids]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return ModelPage(object="list", data=cards, first_id=first, last_id=last, has_more=has_more)

    def readiness(self, strict: bool) -> tuple[bool, dict[str, Any]]:
        """Ready when a map is loaded and a home (or, in a bundle without any, the base) serves; ``strict``: when
        every one does. And the states it stands on."""
        states = {home: group.home_state(home) for home, group in self._group_of.items()}
        serving = [state == READY for state in states.values()] or [g.alive for g in self._groups.values()]
        ready = self._map is not None and (all(serving) if strict else any(serving))
        body = {
            "ready": ready,
            "map": "loaded" if self._map is not None else self._map_failure,
            "homes": states,
            "groups": {name: _group_state(group) for name, group in self._groups.items()},
        }
        return ready, body

    def _find(self, model: str) -> ServedAdapter | None:
        """None for the base. Raises UnknownAdapter, or ApiError before the map is there."""
        serving_map = self._loaded().serving_map
        if model == serving_map.base_name:
            return None
        if model not in serving_map.adapters:
            raise unknown_model(model)
        return serving_map.find(model)

    def _choose_group(self, adapter: ServedAdapter | None) -> GroupClient:
        if adapter is not None:
            group = self._group_of[adapter.home]
        else:
            group = min(self._groups.values(), key=lambda group: (not group.alive, group.num_inflight))
        group.check(adapter.home if adapter else None)
        return group

    def card(self, model_id: str) -> ModelCard:
        loaded, adapter = self._loaded(), self._find(model_id)
        if adapter is None:
            alive = any(group.alive for group in self._groups.values())
            return base_card(
                model_id, loaded.base_fingerprint, loaded.loaded_at, READY if alive else "no group is alive"
            )
        return adapter_card(adapter, loaded.loaded_at, self._group_of[adapter.home].home_state(adapter.home))

    def _loaded(self) -> LoadedMap:
        if self._map is None:
            raise unavailable(f"No serving map yet: {self._map_failure}")
        return self._map

    async def _load_map(self) -> None:
        while self._map is None:
            try:
                bundle = await asyncio.to_thread(Bundle.open, self._spec.bundle, self._spec.revision)
            except (BundleError, StoreError) as error:
                logger.warning("serving map: %s", error)
                self._map_failure = str(error)
                await asyncio.sleep(RETRY_MAP_S)
            else:
                serving_map = bundle.serving_map
                ids = tuple(sorted({serving_map.base_name, *serving_map.adapters}))
                self._map = LoadedMap(serving_map, bundle.manifest.base.fingerprint, ids, int(time.time()))


async def _until(deadline: float, chunks: IndexedChunks) -> IndexedChunks:
    """The same elements. Raises TimeoutError when one is not there at ``deadline`` (the event loop's time)."""
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    indexed = await anext(chunks)
            except StopAsyncIteration:
                return
            yield indexed


async def _stream(chunks: IndexedChunks, answering: Answering, headers: Mapping[str, str]) -> Response:
    """Answers when every choice has begun: until then an error still has its own HTTP status."""
    begun: list[tuple[int, GenerationChunk]] = []
    try:
        while len({index for index, _ in begun}) < answering.num_choices:
            begun.append(await anext(chunks))
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(_events(begun, chunks, answering), chunks, headers)


async def _events(
    begun: Sequence[tuple[int, GenerationChunk]], chunks: IndexedChunks, answering: Answering
) -> AsyncGenerator[str, None]:
    for opening in answering.opening():
        yield _event(opening)
    try:
        for index, chunk in begun:
            answering.add(index, chunk)
            yield _event(answering.piece(index, chunk))
        async for index, chunk in chunks:
            answering.add(index, chunk)
            yield _event(answering.piece(index, chunk))
    except Exception as error:
        # The status line is long gone. What follows an error event is nothing, not even [DONE].
        answer = as_api_error(error)
        if answer.status == 500:
            logger.exception("request failed in mid-stream")
        yield f"data: {json.dumps(answer.body)}\n\n"
        return
    for closing in answering.closing():
        yield _event(closing)
    yield "data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """Server-sent events. Closes its generators however it ends: when the client goes away Starlette leaves
    them suspended, and the engine would go on until the garbage collector comes by."""

    def __init__(self, events: AsyncGenerator[str, None], chunks: IndexedChunks, headers: Mapping[str, str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-cache"})
        self._closing = (events, chunks)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._closing:
                await generator.aclose()


def _event(answer: Answer) -> str:
    return f"data: {answer.model_dump_json(exclude_unset=True)}\n\n"


def as_json(body: BaseModel, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json", headers=headers)


def _cluster_header(adapter: ServedAdapter | None) -> str:
    if adapter is None:
        return "base"
    return adapter.cluster if adapter.cluster is not None else "factors"


def _group_state(group: GroupClient) -> dict[str, Any]:
    return {
        "alive": group.alive,
        "num_running": group.health.num_running,
        "num_waiting": group.health.num_waiting,
        "num_inflight": group.num_inflight,
    }
