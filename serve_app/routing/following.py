"""Which revision of the bundle is served: CURRENT's, once every replica has it. Pure; who asks is in ``router.py``.

    a router sees CURRENT move -> tells all replicas, which prepare it -> all have it: the router switches
                               -> no router serves the old one any more: the replicas release it

What a replica refuses is not switched to: the old revision goes on. (Prepare, switch, release as in two-phase commit,
without its blocking: who is not alive is not waited for, and takes up what is served when it is asked.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.engine.protocol import EngineHealth


@dataclass(frozen=True)
class RouterState:
    """What a router says of itself: the plan that it was deployed with, the revision that it serves, and the one that
    it would."""

    router: str
    plan: str
    serving: int | None
    wanted: int | None


@dataclass(frozen=True)
class ReplicaStatus:
    """What a replica says of itself. ``plan``: that it was deployed with. ``reason``: why it is not alive.
    ``refused``: revision -> why it is not held, or should not be switched to. ``background``: what its background tasks
    ended by."""

    replica: str
    plan: str
    health: EngineHealth
    reason: str = ""
    refused: dict[int, str] = field(default_factory=dict)
    background: dict[str, str] = field(default_factory=dict)

    @property
    def held(self) -> set[int]:
        return set(self.health.revisions)


def choose_revision(
    wanted: int, serving: int | None, replicas: Sequence[ReplicaStatus], all_at_zero: bool = False
) -> int:
    """Semantics: ``wanted`` where all that live hold it and none refuses it; else ``serving`` while none of them
    refuses it; else the highest that all hold. A router that has just started serves nothing; where no replica is there
    either, ``wanted``; and so it is where all groups are at zero, for nobody is there to wait for.
    """
    living = [replica for replica in replicas if replica.health.alive]
    if not living:
        return wanted if serving is None or all_at_zero else serving
    if all(wanted in replica.held and wanted not in replica.refused for replica in living):
        return wanted
    if serving is not None and not any(serving in replica.refused for replica in living):
        return serving
    common = set.intersection(*(replica.held for replica in living))
    return max(common, default=wanted if serving is None else serving)


def why_not(wanted: int, replicas: Sequence[ReplicaStatus]) -> str:
    """Why ``wanted`` is not served yet."""
    for replica in replicas:
        if (reason := replica.refused.get(wanted)) is not None:
            return f"replica {replica.replica} refuses revision {wanted}: {reason}"
    preparing = sum(wanted not in replica.held for replica in replicas if replica.health.alive)
    return f"revision {wanted} is being prepared by {preparing} replicas"
