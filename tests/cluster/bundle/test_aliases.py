"""Names that stand for adapters: what is read, what is refused, who is chosen, and writes that lose nothing."""

from __future__ import annotations

import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.bundle import aliases as module
from cluster.bundle.aliases import (
    KEY,
    MAX_BYTES,
    Targets,
    alias_faults,
    aliases_etag,
    change_aliases,
    choose_target,
    read_aliases,
)
from cluster.errors import BundleError, ConfigError, PublishConflict, StoreConflict
from cluster.store.address import open_store
from cluster.store.local import LocalStore

KEYS = [f"user-{number}".encode() for number in range(4000)]
weights = st.integers(0, 1000)
splits = st.dictionaries(st.sampled_from(["v1", "v2", "v3", "t/v4"]), weights, min_size=1).filter(
    lambda split: any(split.values())
)


def chosen(targets: Targets, alias: str = "support") -> list[str]:
    return [choose_target(alias, targets, key) for key in KEYS]


# --- Who is chosen ------------------------------------------------------------------------------------------


def test_a_key_is_always_answered_by_the_same_adapter_in_any_process_and_any_order_of_the_document() -> None:
    assert choose_target("support", {"v7": 90, "v8": 10}, b"") == "v7"
    # Fixed by the definition, not by this build: what another router, or a later version, must choose too.
    assert "".join(own[1] for own in chosen({"v7": 50, "v8": 50})[:24]) == "788887877887787887877887"
    assert chosen({"v8": 10, "v7": 90}) == chosen({"v7": 90, "v8": 10}) == chosen({"v7": 900, "v8": 100})


@pytest.mark.parametrize("split", [{"v7": 90, "v8": 10}, {"v1": 1, "v2": 2, "v3": 5}, {"v1": 1, "v2": 1_000_000}])
def test_each_adapter_gets_its_share_of_the_keys(split: dict[str, int]) -> None:
    found = Counter(chosen(split))
    for target, weight in split.items():
        share = weight / sum(split.values())
        assert abs(found[target] - len(KEYS) * share) <= 4.5 * math.sqrt(len(KEYS) * share * (1 - share)), target


@given(splits, weights, st.binary(max_size=40))
def test_where_one_weight_changes_a_key_moves_only_to_who_gains_or_from_who_loses(
    split: dict[str, int], weight: int, key: bytes
) -> None:
    for target in split:
        after = split | {target: weight}
        if any(after.values()):
            was, now = choose_target("a", split, key), choose_target("a", after, key)
            assert was == now or (now if weight > split[target] else was) == target


def test_as_many_keys_move_as_shares_do_and_those_that_had_moved_stay() -> None:
    steps = [chosen({"v7": 100 - canary, "v8": canary}) for canary in (0, 10, 50, 100)]
    have = [{key for key, own in zip(KEYS, step, strict=True) if own == "v8"} for step in steps]
    assert have[0] < have[1] < have[2] < have[3]
    assert len(have[0]) == 0
    assert len(have[3]) == len(KEYS)


@given(splits, st.binary(max_size=40))
def test_an_adapter_of_weight_0_is_never_chosen(split: dict[str, int], key: bytes) -> None:
    assert split[choose_target("a", split, key)] > 0


def test_the_keys_of_two_aliases_fall_independently() -> None:
    split = {"v7": 50, "v8": 50}
    both = sum(a == b for a, b in zip(chosen(split, "one"), chosen(split, "two"), strict=True))
    assert abs(both - len(KEYS) / 2) <= 4.5 * math.sqrt(len(KEYS) / 4)


def test_an_alias_that_cannot_do_what_it_says_is_told_with_the_reason() -> None:
    aliases = {"fine": {"a": 1, "gone": 0}, "lost": {"a": 1, "gone": 9}, "a": {"b": 1}, "org/base": {"a": 1}}
    faults = alias_faults(aliases, "org/base", {"a", "b"})
    assert faults.keys() == {"lost", "a", "org/base"}
    assert "gone is not served" in faults["lost"]
    assert "an adapter has this name" in faults["a"]
    assert "the base has this name" in faults["org/base"]


# --- The document -------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"format": 1, "aliases": {"support": {"v7": 90, "tenant/v8": 0}}}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert read_aliases(store) == ({}, None)
    assert aliases_etag(store) is None
    assert change_aliases(store, lambda _: GOOD["aliases"]) == ({}, GOOD["aliases"])
    assert json.loads((tmp_path / KEY).read_bytes()) == GOOD
    assert read_aliases(store) == (GOOD["aliases"], aliases_etag(store))
    assert change_aliases(store, lambda before: {**before, "other": {"v7": 1}})[0] == GOOD["aliases"]
    assert change_aliases(store, lambda before: {"support": before["support"]})[1] == GOOD["aliases"]
    etag = aliases_etag(store)
    change_aliases(store, lambda before: before)
    assert aliases_etag(store) == etag  # nothing to change, nothing written


BAD = {
    "[]": "it is a JSON list",
    "{": "Expecting",
    "\udcff": "utf-8",
    '{"format": 1}': "key 'aliases' is missing",
    '{"aliases": {}}': "key 'format' is missing",
    '{"format": 2, "aliases": {}}': "format 2, this build knows format 1",
    '{"format": true, "aliases": {}}': "format True",
    '{"format": 1, "aliases": {}, "weights": {}}': "unknown key 'weights'",
    '{"format": 1, "aliases": []}': "aliases is a JSON list",
    '{"format": 1, "aliases": {"a": "v7"}}': "alias a: a JSON str",
    '{"format": 1, "aliases": {"a": {}}}': "alias a: no target has a weight above 0",
    '{"format": 1, "aliases": {"a": {"v7": 0, "v8": 0}}}': "alias a: no target has a weight above 0",
    '{"format": 1, "aliases": {"a": {"v7": -1}}}': "weight of v7 is -1, expected a whole number from 0",
    '{"format": 1, "aliases": {"a": {"v7": 1.0}}}': "weight of v7 is 1.0",
    '{"format": 1, "aliases": {"a": {"v7": true}}}': "weight of v7 is True",
    '{"format": 1, "aliases": {"a": {"v7": "1"}}}': "weight of v7 is 1",
    '{"format": 1, "aliases": {"a": {"v7": 1000001}}}': "weight of v7 is 1000001",
    '{"format": 1, "aliases": {"a": {"v7": 1, "v7": 2}}}': "key 'v7' is there twice",
    '{"format": 1, "aliases": {"a": {"v7": 1}, "a": {"v8": 1}}}': "key 'a' is there twice",
    '{"format": 1, "aliases": {"a/b/c": {"v7": 1}}}': "alias 'a/b/c': expected one or two segments",
    '{"format": 1, "aliases": {"": {"v7": 1}}}': "alias '': expected one or two segments",
    '{"format": 1, "aliases": {"a": {"../v7": 1}}}': "target '../v7': expected one or two segments",
    '{"format": 1, "aliases": {"a": {"b": 1}, "b": {"v7": 1}}}': "alias a: target b is an alias itself",
    '{"format": 1, "aliases": {"a": {"a": 1}}}': "alias a: target a is an alias itself",
    json.dumps(GOOD | {"aliases": {"a": {f"v{n}": 1 for n in range(33)}}}): "alias a: 33 targets, expected at most 32",
    json.dumps(GOOD | {"aliases": {f"a{n}": {"v": 1} for n in range(10001)}}): "10001 aliases, expected at most",
    "[" * 100_000: "",
    " " * (MAX_BYTES + 1): f"it has {MAX_BYTES + 1} bytes",
}


@pytest.mark.parametrize("content", BAD, ids=[told or "nested" for told in BAD.values()])
def test_a_document_of_another_form_is_refused_by_what_is_wrong_and_never_overwritten(
    tmp_path: Path, content: str
) -> None:
    store, data = open_store(str(tmp_path)), content.encode(errors="surrogateescape")
    store.write(KEY, data)
    for use in (read_aliases, lambda store: change_aliases(store, lambda _: GOOD["aliases"])):
        with pytest.raises(BundleError) as raised:
            use(store)
        assert str(raised.value).startswith(f"{store.uri}/{KEY}: ")
        assert BAD[content] in str(raised.value)
    assert (tmp_path / KEY).read_bytes() == data


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(ConfigError, match=r"alias a: target b is an alias itself.*nothing was changed"):
        change_aliases(store, lambda _: {"a": {"b": 1}, "b": {"v7": 1}})
    assert list(store.list()) == []


# --- Writers ------------------------------------------------------------------------------------------------


def point(name: str) -> module.Change:
    return lambda before: {**before, name: {"v7": 1}}


def test_aliases_that_are_set_at_once_are_all_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: change_aliases(store, point(name)), "abcd"))
    assert read_aliases(store)[0].keys() == set("abcd")


class Racing(LocalStore):
    """Somebody else writes before each of ours. ``loses_answers``: ours is written, and its answer lost."""

    def __init__(self, path: str, races: int, loses_answers: bool = False) -> None:
        super().__init__(path)
        self.races, self.loses_answers = races, loses_answers

    def replace(self, key: str, data: bytes, *, if_match: str) -> str:
        if self.loses_answers:
            super().replace(key, data, if_match=if_match)
            raise StoreConflict("the retry met the first try's object")
        if self.races:
            self.races -= 1
            change_aliases(LocalStore(self.uri), point(f"other-{self.races}"))
        return super().replace(key, data, if_match=if_match)


@pytest.fixture
def root(tmp_path: Path) -> str:
    change_aliases(LocalStore(str(tmp_path)), point("first"))
    return str(tmp_path)


def test_a_lost_race_begins_anew_on_what_the_other_wrote(root: str) -> None:
    before, after = change_aliases(Racing(root, races=2), point("ours"))
    assert before.keys() == {"first", "other-0", "other-1"}
    assert after.keys() == before.keys() | {"ours"}
    with pytest.raises(PublishConflict, match="changed by others all the time"):
        change_aliases(Racing(root, races=99), point("never"))


def test_a_write_whose_answer_was_lost_still_tells_what_was_before(root: str) -> None:
    before, after = change_aliases(Racing(root, races=0, loses_answers=True), point("ours"))
    assert before.keys() == {"first"}
    assert after == read_aliases(LocalStore(root))[0]
    assert after.keys() == {"first", "ours"}
