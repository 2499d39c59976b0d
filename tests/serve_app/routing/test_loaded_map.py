"""Who answers to a name, and which aliases are in force while a revision is coming."""

from __future__ import annotations

import pytest

from cluster.bundle.aliases import Aliases
from cluster.bundle.serving_map import ServedAdapter, ServingMap
from serve_app.openai.errors import ApiError
from serve_app.routing.loaded_map import LoadedMap, aliases_in_force

BASE = "org/base"


def adapters(*names: str) -> dict[str, ServedAdapter]:
    return {name: ServedAdapter(name, "cluster:0", 0, "core", "0", f"sha256:{name}", "sha256:v", 0.0) for name in names}


def loaded(aliases: Aliases | None) -> LoadedMap:
    serving_map = ServingMap(BASE, adapters("v7", "v8", "taken"))
    return LoadedMap(0, serving_map, "sha256:base", {"cluster:0": "group-0"}, 0, aliases)


def found(map_: LoadedMap, model: str, key: bytes = b"somebody") -> str:
    served = map_.find(model, key)
    return BASE if served is None else served.adapter_id


def told(map_: LoadedMap, model: str) -> ApiError:
    with pytest.raises(ApiError) as raised:
        map_.find(model, b"somebody")
    return raised.value


def test_an_alias_is_answered_by_its_targets_and_everything_else_by_who_has_the_name() -> None:
    map_ = loaded({"support": {"v7": 90, "v8": 10}, "taken": {"v7": 1}, BASE: {"v7": 1}})
    by_key = [found(map_, "support", str(number).encode()) for number in range(100)]
    assert by_key == [found(map_, "support", str(number).encode()) for number in range(100)]
    assert set(by_key) == {"v7", "v8"}
    assert [found(map_, name) for name in ("v8", "taken", BASE)] == ["v8", "taken", BASE]
    assert (map_.targets("support"), map_.targets("taken"), map_.targets(BASE)) == ({"v7": 90, "v8": 10}, None, None)
    assert map_.model_ids == [BASE, "support", "taken", "v7", "v8"]


def test_a_target_that_is_not_served_is_a_404_that_names_both_and_nobody_else_answers() -> None:
    map_ = loaded({"support": {"v9": 1, "v7": 0}, "based": {BASE: 1}, "chained": {"support": 1}})
    for alias, target in (("support", "v9"), ("based", BASE), ("chained", "support")):
        error = told(map_, alias)
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert repr(alias) in error.message
        assert repr(target) in error.message


def test_an_unknown_name_is_a_404_but_a_503_while_nobody_knows_the_aliases() -> None:
    assert told(loaded({}), "nobody").status == 404
    unknown = loaded(None)
    assert told(unknown, "support").status == 503
    assert (found(unknown, "v7"), found(unknown, BASE)) == ("v7", BASE)


@pytest.mark.parametrize(
    ("read", "in_force"),
    [
        ({"a": {"v7": 90, "v9": 10}}, {"a": {"v7": 1}}),  # v9 is being loaded: as before, until it is there
        ({"a": {"v7": 90, "v9": 0}}, {"a": {"v7": 90, "v9": 0}}),  # it gets nothing yet
        ({"a": {"v8": 1}}, {"a": {"v8": 1}}),
        ({"a": {"v8": 90, "gone": 10}}, {"a": {"v8": 90, "gone": 10}}),  # nobody will ever have it: a 404 says so
        ({"new": {"v9": 1}}, {"new": {"v9": 1}}),  # there is nothing before it
        ({}, {}),  # taken away
    ],
)
def test_an_alias_waits_for_an_adapter_that_is_being_loaded_and_for_nothing_else(
    read: Aliases, in_force: Aliases
) -> None:
    served, coming = adapters("v7", "v8"), adapters("v7", "v9")
    assert aliases_in_force({"a": {"v7": 1}}, read, served, coming) == in_force
    # Once that revision is served nothing waits.
    assert aliases_in_force({"a": {"v7": 1}}, read, coming, coming) == read
