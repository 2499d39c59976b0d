"""Which revision a router serves, given what its replicas hold and refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.protocol import EngineHealth
from serve_app.engine.revisions import RevisionHealth
from serve_app.routing.following import ReplicaStatus, choose_revision, why_not


def replica(*held: int, refused: tuple[int, ...] = (), alive: bool = True) -> ReplicaStatus:
    health = EngineHealth(alive, {number: RevisionHealth() for number in held})
    return ReplicaStatus("it", "plan", health, refused=dict.fromkeys(refused, "it is corrupt"))


def started_on(number: int) -> ReplicaStatus:
    """By itself, and not whole."""
    return ReplicaStatus(
        "it", "plan", EngineHealth(True, {number: RevisionHealth()}), refused={number: "home 'cluster:0': gone"}
    )


@pytest.mark.parametrize(
    ("wanted", "serving", "replicas", "chosen"),
    [
        (5, None, [], 5),  # a fresh start: nobody is there yet
        (5, 4, [], 4),  # all are gone: what is served stays
        (5, 4, [replica(4), replica(4, 5)], 4),  # one is not ready
        (5, 4, [replica(4, 5), replica(4, 5)], 5),
        (5, 4, [replica(4, refused=(5,)), replica(4, 5)], 4),  # one refuses it
        (3, 4, [replica(3, 4), replica(4, 3)], 3),  # rolled back
        (5, 4, [replica(4, 5), replica(alive=False)], 5),  # the dead are not waited for
        (5, 4, [replica(4), replica()], 4),  # one has just started: it takes up what it is asked for
        (
            5,
            None,
            [replica(4, refused=(5,)), replica(4, 3, refused=(5,))],
            4,
        ),  # starting beside a broken one
        (5, 5, [replica(4, refused=(5,)), replica(4, refused=(5,))], 4),
        (5, 4, [started_on(5), replica(4, 5)], 4),  # held, but not whole: it says so
        (5, None, [started_on(5)], 5),  # a fresh start with something broken: what there is
        (5, 5, [started_on(5)], 5),
        (5, None, [replica(4), replica(3)], 5),  # nothing in common: asked for, it is taken up
    ],
)
def test_the_next_revision_is_served_once_all_have_it_and_never_one_that_is_refused(
    wanted: int, serving: int | None, replicas: list[ReplicaStatus], chosen: int
) -> None:
    assert choose_revision(wanted, serving, replicas) == chosen


def test_where_all_groups_are_at_zero_the_next_revision_waits_for_nobody() -> None:
    assert choose_revision(5, 4, [], all_at_zero=True) == 5
    assert choose_revision(5, 4, [replica(4, refused=(5,))], all_at_zero=False) == 4


numbers = st.integers(0, 4)
replicas = st.builds(
    lambda held, refused, alive: replica(*held, refused=tuple(refused - held), alive=alive),
    st.sets(numbers),
    st.sets(numbers),
    st.booleans(),
)


@given(numbers, numbers, st.lists(replicas, max_size=4))
def test_a_switch_is_only_to_what_all_who_live_hold(wanted: int, serving: int, those: list[ReplicaStatus]) -> None:
    chosen = choose_revision(wanted, serving, those)
    living = [own for own in those if own.health.alive]
    assert chosen == serving or (living and all(chosen in own.held for own in living))
    if living and all(wanted in own.held for own in living):
        assert chosen == wanted
    # Asked again with nothing changed, it stays.
    assert choose_revision(wanted, chosen, those) == chosen


def test_why_a_revision_is_not_served_names_the_replica_and_the_reason() -> None:
    assert why_not(5, [replica(4), replica(4, refused=(5,))]) == "replica it refuses revision 5: it is corrupt"
    assert why_not(5, [replica(4), replica(4, 5)]) == "revision 5 is being prepared by 1 replicas"
