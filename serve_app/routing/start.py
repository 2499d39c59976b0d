"""When a router that was just deployed takes requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.errors import HomeUnavailable
from serve_app.engine.revisions import READY

# What has failed is tried again a few times before the start has; and it is said again and again.
SETTLE_S, TELL_S, LOOK_S = 60.0, 10.0, 0.25

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Start:
    """How far it is. ``states``: of each home; a bundle without any has none, and its base serves. ``has_settled``:
    every group has said what is there and what is not. ``otherwise``: why there are no homes yet."""

    num_serving: int
    states: Mapping[str, str]
    has_settled: bool
    otherwise: str


async def wait_for_start(look: Callable[[], Start], ready_share: float, timeout_s: float, is_beside: bool) -> None:
    """Until ``ready_share`` of the homes serve; where this ``is_beside`` a router that it replaces, until every group
    has settled as well: what is slow here is served there. The application is not RUNNING before this returns, and what
    was deployed before goes on until then: a broken deploy must not take a healthy one's place. Raises HomeUnavailable
    after ``timeout_s``, or SETTLE_S after no more is to be expected."""
    now = asyncio.get_running_loop().time
    began = told_at = now()
    settled_at: float | None = None
    while not _is_enough(start := look(), ready_share, is_beside):
        settled_at = (settled_at or now()) if start.has_settled else None
        reasons = [f"{home}: {state}" for home, state in start.states.items() if state != READY][:3]
        why = (
            f"{start.num_serving} of {len(start.states)} homes serve, and the application starts with "
            f"start.ready_share {ready_share:g} of them: {'; '.join(reasons) or start.otherwise}"
        )
        if now() - began > timeout_s or (settled_at is not None and now() - settled_at > SETTLE_S):
            raise HomeUnavailable(why)
        if now() - told_at > TELL_S:
            told_at = now()
            logger.warning("%s", why)
        await asyncio.sleep(LOOK_S)


def _is_enough(start: Start, ready_share: float, is_beside: bool) -> bool:
    return start.num_serving >= ready_share * max(1, len(start.states)) and (start.has_settled or not is_beside)
