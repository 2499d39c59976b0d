"""Places for served revisions: one each, however many homes have it."""

from __future__ import annotations

from serve_app.engine.vllm.plugin.room import Room


def test_what_two_holders_have_in_common_has_one_place_until_both_have_left() -> None:
    room = Room(3)
    first, new = room.take(["a", "b"])
    assert (len(set(first.values())), new) == (2, {"a", "b"})
    assert room.lacks(["b", "c"]) == 1
    second, new = room.take(["b", "c"])
    assert (second["b"], new) == (first["b"], {"c"})
    assert room.num_free == 0
    assert room.give_back(["a", "b"]) == [first["a"]]
    assert sorted(room.give_back(["b", "c"])) == sorted([second["b"], second["c"]])
    assert room.num_free == 3
    assert len(set(room.take(["x", "y", "z"])[0].values())) == 3


def test_two_slots_of_one_served_revision_are_one_place() -> None:
    room = Room(2)
    assert room.take(["a", "a", "b"])[1] == {"a", "b"}
    room.give_back(["a", "a", "b"])
    assert room.num_free == 2
