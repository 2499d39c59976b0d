"""Which revisions a replica holds: those that routers serve, and the one that they want."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import CtsError, HomeUnavailable
from serve_app.engine.protocol import Engine
from serve_app.engine.revisions import Revision
from serve_app.routing.following import RouterState

# A router that is silent for so long is gone, and what it served with it.
ROUTER_GONE_S = 30.0
# What a router sent before it switched may still be under way to us.
RELEASE_GRACE_S = 10.0
# A revision that was refused, and a home that failed, are tried again: what is missing may have been put back.
RETRY_S = 15.0
LOOK_S = 0.5

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class _Refused:
    reason: str
    at: float


class Keeper:
    """``open_revision`` opens a revision of the bundle by its number, in a worker thread."""

    def __init__(self, engine: Engine, open_revision: Callable[[int], Revision]) -> None:
        self._engine, self._open = engine, open_revision
        self._first = next(iter(engine.health().revisions), None)
        self._routers: dict[str, tuple[RouterState, float]] = {}
        self._refused: dict[int, _Refused] = {}
        self._used_at: dict[int, float] = {}
        self._mended_at = 0.0
        self._taking_up = asyncio.Lock()
        self._releasing: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    @property
    def refused(self) -> dict[int, str]:
        told = {number: refused.reason for number, refused in self._refused.items()}
        # What it started with is held as far as it goes; but nobody should come over to that who serves another whole.
        first, served = self._first, {state.serving for state, _ in self._routers.values()}
        if first is None or first in served or (health := self._engine.health().revisions.get(first)) is None:
            return told
        if failures := health.failures():
            told[first] = failures[0]
        return told

    def hear(self, state: RouterState) -> None:
        self._routers[state.router] = state, _now()
        self._news.set()

    async def find(self, adapter_id: str, number: int) -> ServedAdapter:
        """As revision ``number`` has it, which is taken up where it is not held: by a replica that has just started, or
        was not there when it was prepared. Raises UnknownAdapter, and HomeUnavailable where it cannot be."""
        self._used_at[number] = _now()
        try:
            return self._engine.find(adapter_id, number)
        except HomeUnavailable:
            await self._ensure(number)
            return self._engine.find(adapter_id, number)

    async def _ensure(self, number: int) -> None:
        """It is held when this returns. Raises HomeUnavailable."""
        if number not in self._refused:
            # Not in the request's own task, which may be cancelled half-way.
            await asyncio.shield(asyncio.ensure_future(self._take_up(number)))
        if (refused := self._refused.get(number)) is not None:
            raise HomeUnavailable(f"revision {number} is not being served: {refused.reason}")

    async def run(self) -> None:
        """For ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), LOOK_S)
            self._news.clear()
            self._forget_routers()
            wanted = self._wanted()
            for number in wanted:
                self._used_at[number] = _now()
                if number not in self._engine.health().revisions and self._may_try(number):
                    await self._take_up(number)
            await self._mend()
            wanted = self._wanted()  # routers may have changed their minds meanwhile
            self._refused = {number: refused for number, refused in self._refused.items() if number in wanted}
            self._release_unused(wanted)

    def _forget_routers(self) -> None:
        self._routers = {name: own for name, own in self._routers.items() if _now() - own[1] < ROUTER_GONE_S}

    def _wanted(self) -> set[int]:
        """By any router."""
        said = (number for state, _ in self._routers.values() for number in (state.serving, state.wanted))
        return {number for number in said if number is not None}

    def _may_try(self, number: int) -> bool:
        refused = self._refused.get(number)
        return refused is None or _now() - refused.at > RETRY_S

    async def _take_up(self, number: int) -> None:
        async with self._taking_up:
            if number in self._engine.health().revisions:
                return
            began = _now()
            try:
                await self._engine.take_up(await asyncio.to_thread(self._open, number))
            except Exception as error:
                # Only our own errors are written for a client's eyes.
                reason = str(error) if isinstance(error, CtsError) else f"{type(error).__name__}; see the replica's log"
                if number not in self._refused:
                    logger.warning(
                        "revision %s is refused: %s", number, error, exc_info=not isinstance(error, CtsError)
                    )
                self._refused[number] = _Refused(reason, _now())
            else:
                self._refused.pop(number, None)
                logger.info("revision %s is held; it took %.1f s", number, _now() - began)

    async def _mend(self) -> None:
        if _now() - self._mended_at < RETRY_S:
            return
        self._mended_at = _now()
        for number, health in self._engine.health().revisions.items():
            if not health.failures():
                continue
            try:
                async with self._taking_up:
                    await self._engine.take_up(await asyncio.to_thread(self._open, number))
            except Exception as error:
                logger.warning("what failed of revision %s still does: %s", number, error)

    def _release_unused(self, wanted: set[int]) -> None:
        held = self._engine.health().revisions
        for number in set(held) - wanted:
            # What nobody was heard to serve may be all that there is.
            if not wanted & set(held) or _now() - self._used_at.setdefault(number, _now()) < RELEASE_GRACE_S:
                continue
            del self._used_at[number]
            logger.info("revision %s is released", number)
            # It waits for requests that run on it, and nothing waits for it.
            task = asyncio.create_task(self._engine.release(number))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)


def _now() -> float:
    return asyncio.get_running_loop().time()
