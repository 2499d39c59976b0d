"""Which replicas a router asks while a deploy puts others in their place: by Serve's own loop."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from serve_app.routing.own_replicas import PLAN, OwnReplicas

GROUP = DeploymentID("group-0", "app")


def replica(name: str, plan: str) -> Any:
    async def get_queue_len(deadline_s: float) -> int:
        return 0

    found = SimpleNamespace(replica_id=ReplicaID(name, GROUP), replica_metadata={PLAN: plan}, node_id="here")
    found.availability_zone, found.multiplexed_model_ids, found.max_ongoing_requests = None, set(), 10
    found.get_queue_len = get_queue_len
    return found


OLD, OTHER_OLD, NEW = replica("old", "before"), replica("other", "before"), replica("new", "after")


def router(plan: str) -> OwnReplicas:
    made = OwnReplicas(deployment_id=GROUP, handle_source=DeploymentHandleSource.REPLICA)
    made.initialize_state(plan=plan)
    return made


def names(router: OwnReplicas) -> set[str]:
    return {own.unique_id for own in router.curr_replicas}


async def chosen(router: OwnReplicas) -> set[str]:
    pending = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("id", "id"))
    found = set()
    for _ in range(20):
        for rank in await router.choose_replicas(list(router.curr_replicas.values()), pending):
            found |= {own.replica_id.unique_id for own in rank}
    return found


@pytest.mark.parametrize(
    ("plan", "lists", "asked"),
    [
        ("before", [[OLD, OTHER_OLD]], {"old", "other"}),
        ("before", [[OLD, OTHER_OLD], [OLD, NEW]], {"old"}),
        ("before", [[OLD, OTHER_OLD], [NEW]], {"old", "other"}),  # they answer until their routers have gone
        ("before", [[OLD], [OLD, NEW], [NEW], [NEW]], {"old"}),
        ("after", [[OLD], [OLD, NEW]], {"new"}),
        ("after", [[OLD]], set()),
        ("before", [[OLD], []], set()),  # scaled to zero: nobody stays for that
    ],
)
def test_a_router_asks_the_replicas_of_its_own_plan(plan: str, lists: list[list[Any]], asked: set[str]) -> None:
    async def run() -> None:
        own = router(plan)
        for replicas in lists:
            own.update_replicas(replicas)
        assert await chosen(own) == asked

    asyncio.run(run())


def test_one_that_died_is_kept_no_longer() -> None:
    async def run() -> None:
        own = router("before")
        own.update_replicas([OLD, OTHER_OLD])
        own.update_replicas([NEW])
        own.on_replica_actor_died(OLD.replica_id)
        own.update_replicas([NEW])
        assert names(own) == {"other", "new"}

    asyncio.run(run())


def test_where_no_own_one_is_there_the_event_loop_goes_on_and_a_request_waits() -> None:
    """Serve asks again at once unless it is told to back off: a router that does so answers nobody."""

    async def run() -> None:
        own = router("after")
        own.update_replicas([OLD])
        pending = PendingRequest(args=[], kwargs={}, metadata=RequestMetadata("id", "id"))

        async def ask() -> None:
            async for _ in own._choose_replicas_with_backoff(pending):
                return

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.2)
        assert not asking.done()
        own.update_replicas([OLD, NEW])
        await asyncio.wait_for(asking, 10)

    asyncio.run(asyncio.wait_for(run(), 30))
