"""Which of a group's replicas a router asks: those of its own plan, while Serve puts others in their place."""

from __future__ import annotations

import random

from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RunningReplica

PLAN = "plan"
# For so long a call lasts that keeps a replica there; and so late Serve looks whether calls are left: a router has
# seen by then that other replicas are there.
STAY_S, DRAIN_LOOK_S = 20.0, 7.0


class OwnReplicas(PowerOfTwoChoicesRequestRouter):
    """Serve's power of two choices among the replicas that say the same plan.

    A deploy replaces routers and groups independently of each other: for a while routers of the plan before and of the
    new one see replicas of both. And Serve takes the last replica of the plan before from the list as soon as a new one
    runs, though its routers still have requests. It is kept here, for it answers until its calls have ended, one of
    which is each router's ``stay``. Of a deployment that Serve deletes nothing can be kept: no call is sent then.
    """

    def initialize_state(self, plan: str) -> None:
        # Once: another deploy's arguments do not reach a router that is there.
        self._plan = plan

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        if replicas and not any(map(self._is_own, replicas)):
            replicas = [*replicas, *filter(self._is_own, self._replicas.values())]
        super().update_replicas(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        own = list(filter(self._is_own, candidate_replicas))
        if len(own) == len(candidate_replicas):
            by_serve: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
            return by_serve
        if pending_request is not None:
            # Else Serve asks again at once, for ever, and the event loop does nothing else.
            pending_request.routing_context.should_backoff = True
        return [random.sample(own, min(2, len(own)))] if own else []

    def _is_own(self, replica: RunningReplica) -> bool:
        return bool(replica.replica_metadata.get(PLAN) == self._plan)
