"""The router: the model field names an adapter, the serving map its home, the placement the home's group;
that group's replicas generate. ``serve_app.http.routes`` has the routes to it.

    read the envelope -> find the adapter -> choose its group, if that is there -> ask it -> pass on what it says

Every call has a deadline. Where a group is not there or is full, the router answers by itself. It does no model work.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from fastapi.responses import Response
from ray.serve.handle import DeploymentHandle

from cluster.bundle.serving_map import ServedAdapter
from serve_app.engine.home_states import READY
from serve_app.openai.answers import ModelCard, ModelPage, adapter_card, base_card, page
from serve_app.openai.call import Call, Endpoint, read_envelope
from serve_app.openai.errors import invalid, unknown_model
from serve_app.routing.groups import GroupClient
from serve_app.routing.map_loader import MapLoader
from serve_app.routing.responses import as_events, as_response

DEFAULT_PAGE, MAX_PAGE = 1000, 10_000
_ID_PREFIXES: dict[Endpoint, str] = {
    "completions": "cmpl",
    "chat": "chatcmpl",
    "tokenize": "tokenize",
    "detokenize": "detokenize",
}


@dataclass(frozen=True)
class RouterSpec:
    """``homes`` is group -> the homes it holds."""

    bundle: str
    revision: int
    homes: Mapping[str, tuple[str, ...]]
    max_inflight: int
    max_prompts: int
    request_timeout_s: float
    sse_keep_alive_s: float
    max_model_len: int
    adapter_chat_templates: bool = True


class Router:
    def __init__(self, spec: RouterSpec, handles: Mapping[str, DeploymentHandle[Any]]) -> None:
        self._spec, self._id = spec, uuid4().hex
        self._groups = {
            name: GroupClient(name, homes, handles[name], spec.max_inflight, self._id)
            for name, homes in spec.homes.items()
        }
        self._group_of = {home: group for group in self._groups.values() for home in group.homes}
        self._map = MapLoader(spec.bundle, spec.revision, spec.adapter_chat_templates)
        # Held, because the event loop itself holds its tasks only weakly.
        works = [self._map.load()]
        works += [work for group in self._groups.values() for work in (group.watch(), group.carrying.run())]
        self._tasks = [asyncio.create_task(work) for work in works]

    async def answer(self, endpoint: Endpoint, body: bytes) -> Response:
        """A completion or a chat, whole or as a stream: made by a replica, passed on here."""
        asked = read_envelope(body)
        adapter = self._find(asked.model)
        group = self._choose_group(adapter)
        if asked.num_sequences > self._spec.max_prompts:
            raise invalid(
                f"the request asks for {asked.num_sequences} sequences (prompts times n), at most "
                f"{self._spec.max_prompts}",
                "n" if asked.num_prompts == 1 else "prompt",
            )
        served = adapter.served if adapter else self._map.get().base_fingerprint
        answer_id = f"{_ID_PREFIXES[endpoint]}-{uuid4().hex}"
        adapter_id = adapter.adapter_id if adapter else None
        call = Call(endpoint, body, answer_id, adapter_id, served, self._id, asked.num_sequences)
        headers = {"X-Served-Revision": served, "X-Cluster": _cluster_header(adapter)}
        deadline = asyncio.get_running_loop().time() + self._spec.request_timeout_s
        if asked.stream:
            pieces = group.stream(call, deadline)
            return await as_events(pieces, headers, self._spec.sse_keep_alive_s)
        return as_response(await group.answer(call, deadline), headers)

    def list_models(self, query: Mapping[str, str]) -> ModelPage:
        """The page that ``limit`` and ``after`` ask for."""
        if unknown := set(query) - {"limit", "after"}:
            raise invalid(f"Unknown parameter {min(unknown)!r}; known are limit and after", min(unknown))
        limit = query.get("limit", str(DEFAULT_PAGE))
        if not (re.fullmatch(r"[0-9]{1,9}", limit) and 1 <= int(limit) <= MAX_PAGE):
            raise invalid(f"limit is {limit[:100]!r}, expected a number from 1 to {MAX_PAGE}", "limit")
        ids, has_more = page(self._map.get().model_ids, query.get("after"), int(limit))
        cards = [self.card(model_id) for model_id in ids]
        first, last = (ids[0], ids[-1]) if ids else (None, None)
        return ModelPage(object="list", data=cards, first_id=first, last_id=last, has_more=has_more)

    def card(self, model_id: str) -> ModelCard:
        loaded, adapter, longest = self._map.get(), self._find(model_id), self._spec.max_model_len
        if adapter is None:
            alive = any(group.alive for group in self._groups.values())
            status = READY if alive else "no group is alive"
            return base_card(model_id, loaded.base_fingerprint, loaded.loaded_at, longest, status)
        status = self._group_of[adapter.home].adapter_state(adapter)
        return adapter_card(adapter, loaded.loaded_at, longest, status)

    def readiness(self, strict: bool) -> tuple[bool, dict[str, Any]]:
        """Ready when a map is loaded and a home (or, in a bundle without any, the base) serves; ``strict``: when
        every one does, with all its adapters. And the states it stands on."""
        states = {home: group.home_state(home) for home, group in self._group_of.items()}
        failed = {adapter: why for group in self._groups.values() for adapter, why in group.health.adapters.items()}
        serving = [state == READY for state in states.values()] or [g.alive for g in self._groups.values()]
        ready = self._map.loaded is not None and (all(serving) and not failed if strict else any(serving))
        body = {
            "ready": ready,
            "map": self._map.state,
            "homes": states,
            "adapters": dict(sorted(failed.items())),
            "groups": {name: _group_state(group) for name, group in self._groups.items()},
        }
        return ready, body

    def _find(self, model: str) -> ServedAdapter | None:
        """None for the base. Raises ApiError: 404 for an unknown model, 503 before the map is there."""
        serving_map = self._map.get().serving_map
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
        group.check(adapter)
        return group


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
