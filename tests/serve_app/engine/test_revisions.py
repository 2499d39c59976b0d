"""What an engine holds of a bundle's revisions: shared where it is the same, and told by revision."""

from __future__ import annotations

from types import MappingProxyType

import pytest

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServedAdapter, ServingMap, home_of
from cluster.errors import HomeUnavailable, UnknownAdapter
from serve_app.engine.revisions import READY, Revision, Revisions


def revision(number: int, *adapters: tuple[str, str, int, str]) -> Revision:
    """Of (id, home, slot, served)."""
    entries = {
        own: ServedAdapter(own, home, slot, "core", home.partition(":")[2], served, "v", 0.0)
        for own, home, slot, served in adapters
    }
    serving_map = ServingMap("base", MappingProxyType(entries))
    return Revision(number, serving_map, tuple(serving_map.homes()), lambda home: LoadedHome({}))


FIRST = revision(0, ("a", "cluster:0", 0, "a0"), ("b", "cluster:0", 1, "b0"), ("c", "cluster:1", 0, "c0"))
SECOND = revision(1, ("a", "cluster:0", 0, "a1"), ("c", "cluster:1", 0, "c0"), ("d", "factors:2.0", 0, "d0"))


@pytest.fixture
def held() -> Revisions:
    held = Revisions()
    for home in held.hold(FIRST):
        held.record(home, READY)
    held.confirm(0)
    return held


def test_a_home_that_is_the_same_is_not_loaded_again(held: Revisions) -> None:
    missing = held.hold(SECOND)
    assert sorted(map(home_of, missing)) == ["cluster:0", "factors:2.0"]
    # Nobody is to ask for it before it is all there.
    assert set(held.health()) == {0}
    with pytest.raises(HomeUnavailable, match="revision 1 is not being served here"):
        held.find("c", 1)
    assert held.find("a").served == "a0"
    held.confirm(1)
    assert set(held.health()) == {0, 1}
    assert held.find("c", 0).home == held.find("c", 1).home
    assert held.find("a", 0).home != held.find("a", 1).home
    held.check(held.find("c", 1))
    with pytest.raises(HomeUnavailable, match="home 'cluster:0' is not being served: not loaded yet"):
        held.check(held.find("a", 1))
    assert sorted(map(home_of, held.drop(0))) == ["cluster:0"]
    held.check(held.find("c", 1))


def test_an_adapter_is_found_at_the_revision_that_is_asked_for(held: Revisions) -> None:
    held.hold(SECOND)
    held.confirm(1)
    assert (held.find("a", 0).served, held.find("a", 1).served, held.find("a").served) == ("a0", "a1", "a1")
    with pytest.raises(UnknownAdapter):
        held.find("b", 1)
    with pytest.raises(HomeUnavailable, match="revision 7 is not being served here; of its bundle are: 0, 1"):
        held.find("a", 7)


def test_only_what_failed_anew_is_a_reason_to_refuse(held: Revisions) -> None:
    shared = held.find("c", 0).home
    held.record(shared, READY, {0: "it is corrupt"})
    assert held.health()[0].adapters == {"c": "it is corrupt"}
    for home in held.hold(SECOND):
        held.record(home, READY, {0: "it is corrupt"} if home == shared else {})
    held.confirm(1)
    assert held.newly_failed(1) == []
    held.record(held.find("d", 1).home, READY, {0: "it is gone"})
    assert held.newly_failed(1) == ["adapter 'd': it is gone"]
    held.record(held.find("a", 1).home, "StoreMissing: no object")
    assert held.newly_failed(1) == ["home 'cluster:0': StoreMissing: no object", "adapter 'd': it is gone"]


def test_a_home_that_comes_again_while_it_is_being_left_is_not_forgotten(held: Revisions) -> None:
    held.hold(SECOND)
    (left,) = held.drop(0)
    assert held.hold(FIRST) == [left]
    held.record(left, READY)
    held.confirm(0)
    held.forget(left)
    held.check(held.find("a", 0))


def test_homes_are_named_by_what_their_slots_answer_with() -> None:
    same = revision(9, ("a", "cluster:0", 0, "a0"), ("b", "cluster:0", 1, "b0"))
    moved = revision(9, ("a", "cluster:0", 1, "a0"), ("b", "cluster:0", 0, "b0"))
    own = FIRST.serving_map.by_content().find("a").home
    assert same.serving_map.by_content().find("a").home == own
    assert moved.serving_map.by_content().find("a").home != own
    assert home_of(own) == "cluster:0"


def test_a_home_that_was_broken_before_is_no_reason_to_refuse_either(held: Revisions) -> None:
    held.record(held.find("c", 0).home, "StoreMissing: no object")
    for home in held.hold(SECOND):
        held.record_failure(home, KeyError("still")) if home_of(home) == "cluster:1" else held.record(home, READY)
    assert held.newly_failed(1) == []


def test_what_is_resident_is_not_taken_away_by_a_look_at_the_store(held: Revisions) -> None:
    home = held.find("a", 0).home
    held.record_failure(home, ConnectionError("the store is away"))
    held.check(held.find("a", 0))
    assert held.failed_of(home) == {}
    lost = held.find("c", 0).home
    held.record(lost, "not loaded yet")
    held.record_failure(lost, ConnectionError("the store is away"))
    assert held.failed_of(lost) is None
    assert held.health()[0].homes["cluster:1"] == "ConnectionError: the store is away"
