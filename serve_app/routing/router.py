"""The router: the model field names an adapter, or an alias of some; the serving map has its home, the placement the
home's group; that group's replicas generate. ``serve_app.http.routes`` has the routes to it.

    read the envelope -> find the adapter -> choose its group, if that is there -> ask it -> pass on what it says

Every call has a deadline. Where a group is not there or is full, the router answers by itself. It does no model work.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

from fastapi.responses import Response
from ray.serve.handle import DeploymentHandle

from cluster.bundle.aliases import Targets
from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import HomeUnavailable
from serve_app.deployed import has_running_replica, is_being_deployed
from serve_app.engine.revisions import READY
from serve_app.openai.answers import AliasCard, ModelCard, ModelPage, adapter_card, alias_card, base_card, page
from serve_app.openai.call import Call, Endpoint, read_envelope
from serve_app.openai.errors import invalid
from serve_app.routing.following import RouterState
from serve_app.routing.gauges import EVERY_S, Gauges
from serve_app.routing.groups import GroupClient
from serve_app.routing.loaded_map import LoadedMap
from serve_app.routing.map_follower import MapFollower
from serve_app.routing.responses import as_events, as_response
from serve_app.routing.start import Start, wait_for_start
from serve_app.supervision import Supervised
from serve_app.watchdog import Watchdog

DEFAULT_PAGE, MAX_PAGE = 1000, 10_000
POLL_INTERVAL_S, FIRST_LOOK_S = 1.0, 5.0

_ID_PREFIXES: dict[Endpoint, str] = {
    "completions": "cmpl",
    "chat": "chatcmpl",
    "tokenize": "tokenize",
    "detokenize": "detokenize",
}


@dataclass(frozen=True)
class RouterSpec:
    """``plan`` names all that was deployed together; ``homes`` is group -> the homes it holds. A fresh start ends when
    ``ready_share`` of these serve, or fails after ``start_timeout_s``. ``refresh_interval_s``: how often aliases and
    CURRENT are looked at. ``follows`` false: the revision is pinned. ``at_zero``: see ``GroupClient``."""

    plan: str
    bundle: str
    revision: int
    homes: Mapping[str, tuple[str, ...]]
    ready_share: float
    start_timeout_s: float
    max_inflight: int
    max_prompts: int
    request_timeout_s: float
    sse_keep_alive_s: float
    max_model_len: int
    refresh_interval_s: float
    follows: bool
    adapter_chat_templates: bool = True
    at_zero: str | None = None


class Router:
    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: RouterSpec, handles: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        self._spec, self._id = spec, uuid4().hex
        self._groups = {
            name: GroupClient(name, handles[name], spec.max_inflight, self._id, spec.at_zero) for name in spec.homes
        }
        self._map = MapFollower(
            spec.bundle,
            spec.revision,
            spec.homes,
            spec.adapter_chat_templates,
            spec.refresh_interval_s,
            spec.follows,
        )
        works: dict[str, Callable[[], Coroutine[Any, Any, None]]]
        works = {"map": self._map.run, "switch": self._switch, "gauges": self._measure}
        for name, group in self._groups.items():
            works |= {f"watch of {name}": partial(self._watch, group), f"carriers of {name}": group.carrying.run}
        self._background = Supervised(works | {"watchdog": Watchdog().run})
        if await asyncio.to_thread(is_being_deployed):
            is_beside = await asyncio.to_thread(has_running_replica, "router")
            try:
                await wait_for_start(self._start, spec.ready_share, spec.start_timeout_s, is_beside)
            except HomeUnavailable:
                self._background.stop()
                raise

    async def check_health(self) -> None:
        """Asked by Serve, which replaces the router when this is not answered. By itself it would ask its own thread,
        where it has one, and not the loop that answers."""

    def _start(self) -> Start:
        num_serving, states = self._serving()
        has_settled = self._map.served is not None and all(
            group.replicas or group.zero.is_now for group in self._groups.values()
        )
        return Start(num_serving, states, has_settled, self._map.unread or self._map.state)

    def _serving(self) -> tuple[int, dict[str, str]]:
        """How many homes serve, or are at zero, where a request wakes them; and the state of each. A bundle without any
        serves the base alone."""
        loaded = self._map.served
        if loaded is None:
            return 0, {}
        states = {home: self._groups[own].home_state(home, loaded.revision) for home, own in loaded.groups.items()}
        if not states:
            return sum(group.can_answer for group in self._groups.values()), states
        at_zero = {home for home, own in loaded.groups.items() if self._groups[own].zero.is_now}
        return sum(state == READY or home in at_zero for home, state in states.items()), states

    async def answer(self, endpoint: Endpoint, body: bytes, sticky_key: bytes = b"") -> Response:
        """A completion or a chat, whole or as a stream: made by a replica, passed on here. ``sticky_key``: by which an
        alias chooses who answers, in place of the body's ``user``."""
        asked, loaded = read_envelope(body), self._map.get()
        answer_id = f"{_ID_PREFIXES[endpoint]}-{uuid4().hex}"
        # Without a key by the answer's id: at random.
        adapter = loaded.find(asked.model, sticky_key or (asked.user or answer_id).encode())
        group = self._choose_group(adapter, loaded)
        if asked.num_sequences > self._spec.max_prompts:
            raise invalid(
                f"the request asks for {asked.num_sequences} sequences (prompts times n), at most "
                f"{self._spec.max_prompts}",
                "n" if asked.num_prompts == 1 else "prompt",
            )
        served = adapter.served if adapter else loaded.base_fingerprint
        adapter_id = adapter.adapter_id if adapter else None
        call = Call(endpoint, body, answer_id, adapter_id, served, loaded.revision, self._id, asked.num_sequences)
        headers = {"X-Served-Revision": served, "X-Cluster": _cluster_header(adapter)}
        if adapter is not None:
            headers["X-Adapter"] = adapter.adapter_id
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

    def card(self, model_id: str) -> ModelCard | AliasCard:
        loaded, longest = self._map.get(), self._spec.max_model_len
        if (targets := loaded.targets(model_id)) is not None:
            return alias_card(model_id, targets, loaded.loaded_at, longest, self._alias_status(targets, loaded))
        adapter = loaded.find(model_id, b"")
        if adapter is None:
            can_answer = any(group.can_answer for group in self._groups.values())
            status = READY if can_answer else "no group is alive"
            return base_card(model_id, loaded.base_fingerprint, loaded.loaded_at, longest, status)
        return adapter_card(adapter, loaded.loaded_at, longest, self._adapter_status(adapter.adapter_id, loaded))

    def readiness(self, strict: bool) -> tuple[bool, dict[str, Any]]:
        """Ready when a map is loaded and a home (or, in a bundle without any, the base) serves, or is at zero, where a
        request wakes it; ``strict``: when every one does, with all its adapters. And the states it stands on."""
        loaded, groups = self._map.served, self._groups.values()
        num_serving, states = self._serving()
        failed: dict[str, str] = {}
        if loaded is not None:
            number = loaded.revision
            failed = {adapter: why for group in groups for adapter, why in group.failed_adapters(number).items()}
        all_serve = num_serving == len(states or groups) and not failed
        ready = loaded is not None and (all_serve if strict else num_serving > 0)
        body = {
            "ready": ready,
            "map": self._map.unread or self._map.state,
            "revision": {
                "bundle": self._spec.bundle.rpartition("/")[2],
                "serving": loaded.revision if loaded else None,
                "wanted": self._map.wanted,
                "converged_s": None if self._map.converged_s is None else round(self._map.converged_s, 1),
            },
            "homes": states,
            "adapters": dict(sorted(failed.items())),
            "aliases": {"state": self._map.alias_reader.state, "faults": self._map.alias_faults()},
            "groups": {name: _group_state(group) for name, group in self._groups.items()},
            "background": self._failures(),
        }
        return ready, body

    def _failures(self) -> dict[str, str]:
        """Of background tasks, the router's and the replicas'."""
        replicas = [own for group in self._groups.values() for own in group.replicas]
        told = {f"{name} of {own.replica}": why for own in replicas for name, why in own.background.items()}
        return dict(self._background.failures) | told

    def _choose_group(self, adapter: ServedAdapter | None, loaded: LoadedMap) -> GroupClient:
        if adapter is not None:
            group = self._groups[loaded.groups[adapter.home]]
        else:
            group = min(
                self._groups.values(), key=lambda group: (not group.alive, not group.zero.is_now, group.num_inflight)
            )
        group.check(adapter, loaded.revision)
        return group

    def _adapter_status(self, adapter_id: str, loaded: LoadedMap) -> str:
        if (adapter := loaded.serving_map.adapters.get(adapter_id)) is None:
            return f"{adapter_id} is not in the served revision"
        return self._groups[loaded.groups[adapter.home]].adapter_state(adapter, loaded.revision)

    def _alias_status(self, targets: Targets, loaded: LoadedMap) -> str:
        """READY where all that requests may fall to are."""
        states = [self._adapter_status(target, loaded) for target, weight in targets.items() if weight > 0]
        return next((state for state in states if state != READY), READY)

    async def _watch(self, group: GroupClient) -> None:
        """Ask how it is, for ever; and at once where another revision is wanted."""
        while True:
            serving = self._map.served.revision if self._map.served else None
            await group.refresh(RouterState(self._id, self._spec.plan, serving, self._map.wanted))
            waiting = [asyncio.ensure_future(news) for news in (self._map.changed(), group.is_suspect.wait())]
            # One that is not there is waited for: asking costs nothing then, and its first request may be on its way.
            interval_s = POLL_INTERVAL_S if group.alive or group.zero.is_asleep else POLL_INTERVAL_S / 5
            await asyncio.wait(waiting, timeout=interval_s, return_when=asyncio.FIRST_COMPLETED)
            for one in waiting:
                one.cancel()

    async def _measure(self) -> None:
        gauges = Gauges()
        while True:
            wanted, served = self._map.wanted, self._map.served
            behind = {
                name: sum(wanted not in own.held for own in group.replicas if own.health.alive)
                for name, group in self._groups.items()
            }
            gauges.set(served.revision if served else None, wanted, self._map.converged_s, behind)
            await asyncio.sleep(EVERY_S)

    async def _switch(self) -> None:
        """Serve what the replicas are ready for, for ever."""
        with contextlib.suppress(TimeoutError):
            asked = (group.has_been_asked.wait() for group in self._groups.values())
            await asyncio.wait_for(asyncio.gather(*asked), FIRST_LOOK_S)
        while True:
            groups = self._groups.values()
            replicas = [own for group in groups for own in group.replicas]
            await self._map.consider(replicas, all(group.zero.is_now for group in groups))
            await asyncio.sleep(POLL_INTERVAL_S / 4)


def _cluster_header(adapter: ServedAdapter | None) -> str:
    if adapter is None:
        return "base"
    return adapter.cluster if adapter.cluster is not None else "factors"


def _group_state(group: GroupClient) -> dict[str, Any]:
    return {
        "alive": group.alive,
        "num_running": group.num_running,
        "num_waiting": group.num_waiting,
        "num_inflight": group.num_inflight,
        "cold_start_s": group.zero.cold_start_s,
        "replicas": {
            own.replica: {"alive": own.health.alive, "revisions": sorted(own.held), "refused": own.refused}
            for own in group.replicas
        },
    }
