"""What Ray's metrics say of a router: which revision it serves and wants, and how its groups keep up.

Ray's port has no keys and forgets no series: so groups are told apart there, which the plan bounds, but neither
replicas nor adapters. `GET /ready` has these.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.serve.metrics import Gauge

EVERY_S = 2.0


class Gauges:
    """Serve adds its own tags: application, deployment, and the router's replica id."""

    def __init__(self) -> None:
        told = "number of the bundle's revision; state: served, or wanted as CURRENT has it"
        self._revision = Gauge("cts_revision", description=told, tag_keys=("state",))
        told = "seconds from when CURRENT was seen to have moved to when its revision was served, the last time"
        self._convergence = Gauge("cts_convergence_seconds", description=told)
        told = "living replicas of a group that do not hold the wanted revision"
        self._behind = Gauge("cts_replicas_behind", description=told, tag_keys=("group",))

    def set(self, served: int | None, wanted: int | None, converged_s: float | None, behind: Mapping[str, int]) -> None:
        """``behind``: by group. What is None is not known yet, and is not told."""
        for state, number in (("served", served), ("wanted", wanted)):
            if number is not None:
                self._revision.set(number, {"state": state})
        if converged_s is not None:
            self._convergence.set(converged_s)
        for group, num_behind in behind.items():
            self._behind.set(num_behind, {"group": group})
