"""The manifest's round trip, and that whatever is wrong with one is a BundleError that names the field."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bundle.manifest import Adapter, Base, Cluster, Manifest, Method, Refused, served_revision, with_slots
from cluster.bundle.parsing import parse_manifest
from cluster.bundle.serving_map import ServingMap, factors_home, factors_rank
from cluster.errors import BundleError
from cluster.hashing import canonical_json
from cluster.layer import ModuleShape

BASIS, CORES, FACTORS = (f"sha256:{digit * 64}" for digit in "abc")
ERRORS = {"error": 0.03, "error_unweighted": 0.04, "error_worst_module": 0.11}


def core(slot: int) -> Adapter:
    served = served_revision("core", BASIS, str(slot))
    return Adapter(version="sha256:v", etag=f"e{slot}", mode="core", served=served, **ERRORS, cluster="0", slot=slot)


MANIFEST = Manifest(
    bundle="",
    revision=0,
    parent=None,
    base=Base("org/tiny", "sha256:f"),
    method=Method("jd-full", 1, 16, 0, "bfloat16", 0.6, ("odd-*",)),
    modules={"model.layers.0.self_attn.q_proj": ModuleShape(576, 192)},
    clusters={"0": Cluster(BASIS, CORES, 3)},
    adapters={
        "number-en": core(2),
        "tenant/näme": core(0),
        "odd-one": Adapter(
            version="sha256:v",
            etag="e",
            mode="raw",
            served=served_revision("raw", FACTORS),
            **(ERRORS | {"error": 0.0}),
            factors=FACTORS,
            rank=8,
            slot=0,
        ),
    },
    refused={"bad-one": Refused("dora", "use_dora = True is not supported")},
    objects={BASIS: 100, CORES: 200, FACTORS: 300},
).with_own_id()

Document = dict[str, Any]
DOCUMENT: Document = json.loads(MANIFEST.to_json())
Path = tuple[str, ...]


def paths(document: Any, above: Path = ()) -> list[Path]:
    """The way to every value of the document."""
    if not isinstance(document, dict):
        return [above]
    below = [path for key, value in document.items() for path in paths(value, (*above, key))]
    return [above, *below] if above else below


def edited(path: Path, edit: Callable[[Document, str], object]) -> bytes:
    document = copy.deepcopy(DOCUMENT)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    edit(parent, path[-1])
    return json.dumps(document).encode()


def refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        parse_manifest(data, "store/manifest.json")
    assert str(caught.value).startswith("store/manifest.json")
    return str(caught.value)


# --- What is right ------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_written_the_same() -> None:
    data = MANIFEST.to_json()
    parsed = parse_manifest(data, "here")
    assert parsed == MANIFEST
    assert parsed.to_json() == data


def test_the_document_has_the_agreed_layout() -> None:
    assert DOCUMENT["format"] == 1
    assert DOCUMENT["objects"][BASIS] == {"size_bytes": 100}
    assert DOCUMENT["parent"] is None
    assert "factors" not in DOCUMENT["adapters"]["number-en"]
    assert "cluster" not in DOCUMENT["adapters"]["odd-one"]


def test_bytes_do_not_depend_on_the_order_things_were_added_in() -> None:
    shuffled = replace(
        MANIFEST,
        adapters=dict(reversed(MANIFEST.adapters.items())),
        objects=dict(reversed(MANIFEST.objects.items())),
    )
    assert shuffled.to_json() == MANIFEST.to_json()


def test_the_id_names_the_content_and_not_its_place_or_etags() -> None:
    assert re.fullmatch("b-[0-9a-f]{16}", MANIFEST.bundle)
    etags = {name: replace(adapter, etag="uploaded again") for name, adapter in MANIFEST.adapters.items()}
    same = replace(MANIFEST, bundle="x", revision=7, parent=6, adapters=etags)
    assert same.with_own_id().bundle == MANIFEST.bundle
    assert same.with_own_id().revision == 7
    others = [
        replace(MANIFEST, base=Base("org/tiny", "sha256:g")),
        replace(MANIFEST, method=replace(MANIFEST.method, seed=1)),
        replace(MANIFEST, refused={}),
        replace(MANIFEST, objects=MANIFEST.objects | {BASIS: 101}),
        replace(MANIFEST, adapters=MANIFEST.adapters | {"number-en": core(1)}),
    ]
    assert len({MANIFEST.bundle, *(other.with_own_id().bundle for other in others)}) == 6


def test_resident_bytes_are_those_of_the_objects() -> None:
    assert MANIFEST.resident_bytes() == 600


def test_served_revisions_differ_by_mode_and_by_every_hash() -> None:
    names = [
        served_revision(*parts) for parts in [("raw", "a", "b"), ("raw", "b", "a"), ("core", "a", "b"), ("raw", "ab")]
    ]
    assert len(set(names)) == 4
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", name) for name in names)


def test_canonical_json_refuses_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": float("nan")})


# --- What is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        ("format",), ("bundle",), ("revision",), ("base",), ("method",), ("modules",), ("clusters",), ("adapters",),
        ("refused",), ("objects",), ("base", "name"), ("base", "fingerprint"), ("method", "name"),
        ("method", "clusters"), ("method", "rank"), ("method", "seed"), ("method", "dtype"), ("method", "gate"),
        ("method", "raw"), ("modules", "model.layers.0.self_attn.q_proj", "d_in"), ("clusters", "0", "basis"),
        ("clusters", "0", "cores"), ("clusters", "0", "num_slots"), ("adapters", "number-en", "version"),
        ("adapters", "number-en", "etag"), ("adapters", "number-en", "mode"), ("adapters", "number-en", "served"),
        ("adapters", "number-en", "error"), ("adapters", "odd-one", "error_worst_module"),
        ("refused", "bad-one", "reason"), ("objects", BASIS, "size_bytes"),
    ],
)  # fmt: skip
def test_a_missing_key_is_refused_by_name(path: Path) -> None:
    assert f"key {path[-1]!r} is missing" in refusal(edited(path, lambda parent, key: parent.pop(key)))


@pytest.mark.parametrize(
    "path",
    [
        *((), ("base",), ("method",), ("modules", "model.layers.0.self_attn.q_proj"), ("clusters", "0")),
        *(("adapters", "odd-one"), ("refused", "bad-one"), ("objects", BASIS)),
    ],
)
def test_an_unknown_key_is_refused_by_name(path: Path) -> None:
    message = refusal(edited((*path, "surprise"), lambda parent, key: parent.update({key: 1})))
    assert "unknown key 'surprise'" in message
    assert all(part in message for part in path)


@pytest.mark.parametrize("path", [path for path in paths(DOCUMENT) if path != ("parent",)])
def test_a_value_of_another_type_is_refused_by_name(path: Path) -> None:
    for wrong in (True, "x", 1, 1.5, [1], {"x": 1}, None):
        value = DOCUMENT
        for key in path:
            value = value[key]
        optional = path[0] == "adapters" and path[-1] in ("cluster", "slot", "factors", "rank")
        if type(wrong) is type(value) or (isinstance(value, float) and wrong == 1) or (optional and wrong is None):
            continue
        message = refusal(edited(path, lambda parent, key, wrong=wrong: parent.update({key: wrong})))
        assert path[-1] in message


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400])
@pytest.mark.parametrize(
    "path",
    [("method", "gate"), ("adapters", "number-en", "error"), ("adapters", "odd-one", "error_unweighted")],
)
def test_a_number_that_is_none_is_refused(path: Path, value: str) -> None:
    data = edited(path, lambda parent, key: parent.update({key: "HERE"})).replace(b'"HERE"', value.encode())
    message = refusal(data)
    assert f"{path[-1]} is " in message
    assert "finite" in message


def test_whole_numbers_may_stand_for_floats_but_not_the_other_way_round() -> None:
    parsed = parse_manifest(edited(("method", "gate"), lambda parent, key: parent.update({key: 1})), "here")
    assert (parsed.method.gate, type(parsed.method.gate)) == (1.0, float)
    assert "rank is 16.0" in refusal(edited(("method", "rank"), lambda parent, key: parent.update({key: 16.0})))


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "expected an object, saw list"),
        (b"null", "expected an object, saw NoneType"),
        (b'{"format": 2}', "format 2, this build reads format 1"),
        (MANIFEST.to_json()[:-10], "not JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(data: bytes, seen: str) -> None:
    assert seen in refusal(data)


NOWHERE = "sha256:" + "d" * 64


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        (("bundle",), "b-123", "'b-123' is not b- and 16 hex digits"),
        (("bundle",), "../../etc", "is not b- and 16 hex digits"),
        (("revision",), -1, "revision is -1"),
        (("method", "name"), "magic", "method 'magic', expected one of"),
        (("modules", "model.layers.0.self_attn.q_proj", "d_in"), 0, "has shape 576 x 0"),
        (("objects", BASIS, "size_bytes"), 0, "of 0 bytes"),
        (("objects", "sha256:../x"), {"size_bytes": 5}, "object 'sha256:../x'"),
        (("clusters", "0", "num_slots"), 0, "cluster 0 has 0 slots"),
        (("clusters", "0", "basis"), NOWHERE, f"cluster 0 names object {NOWHERE}"),
        (("clusters", "0", "cores"), NOWHERE, f"cluster 0 names object {NOWHERE}"),
        (("adapters", "number-en", "mode"), "magic", "number-en has mode 'magic'"),
        (("adapters", "number-en", "mode"), "raw", "number-en is of mode raw with factors None"),
        (("adapters", "odd-one", "mode"), "core", "odd-one is of mode core with cluster None"),
        (("adapters", "number-en", "served"), "me", "number-en has served revision 'me'"),
        (("adapters", "number-en", "cluster"), "9", "number-en is of mode core with cluster '9'"),
        (("adapters", "number-en", "slot"), None, "number-en is of mode core with cluster '0', slot None"),
        (("adapters", "number-en", "slot"), 3, "number-en has slot 3 of 3"),
        (("adapters", "number-en", "slot"), -1, "number-en has slot -1 of 3"),
        (("adapters", "number-en", "slot"), 0, "shares slot 0 of cluster 0 with another"),
        (("adapters", "number-en", "factors"), FACTORS, "number-en is of mode core"),
        (("adapters", "odd-one", "factors"), NOWHERE, f"odd-one is of mode raw with factors '{NOWHERE}'"),
        (("adapters", "odd-one", "cluster"), "0", "odd-one is of mode raw"),
        (("adapters", "odd-one", "slot"), -1, "odd-one has slot -1"),
        (("adapters", "odd-one", "rank"), None, "odd-one has rank None"),
        (("adapters", "odd-one", "rank"), 0, "odd-one has rank 0"),
        (("adapters", "number-en", "rank"), 4, "number-en is of mode core"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused_by_name(path: Path, value: object, seen: str) -> None:
    assert seen in refusal(edited(path, lambda parent, key: parent.update({key: value})))


def alone(rank: int, slot: int | None = None) -> Adapter:
    served = served_revision("truncated", FACTORS)
    return Adapter("sha256:v", "e", "truncated", served, **ERRORS, factors=FACTORS, rank=rank, slot=slot)


def test_who_stands_alone_takes_the_lowest_slot_of_its_rank_that_is_free_and_keeps_it() -> None:
    adapters = {"e": alone(2), "d": alone(2, 1), "c": alone(3), "b": alone(2), "a": alone(2, 4), "on": core(1)}
    given = with_slots(adapters)
    assert {name: adapter.slot for name, adapter in given.items()} == {"a": 4, "b": 0, "c": 0, "d": 1, "e": 2, "on": 1}
    assert list(given) == list(adapters)
    assert with_slots(given) == given
    del given["d"]  # its slot is the next one's, nobody else moves
    assert with_slots(given | {"f": alone(2)}) == given | {"f": alone(2, 1)}


def test_a_manifest_written_without_slots_gets_them_in_the_order_of_ids() -> None:
    document = copy.deepcopy(DOCUMENT)
    del document["adapters"]["odd-one"]["slot"]
    document["adapters"]["an-odd-one"] = document["adapters"]["odd-one"]
    parsed = parse_manifest(json.dumps(document).encode(), "here")
    assert (parsed.adapters["an-odd-one"].slot, parsed.adapters["odd-one"].slot) == (0, 1)
    assert parse_manifest(parsed.to_json(), "again") == parsed


def test_two_that_stand_alone_do_not_share_a_slot() -> None:
    document = copy.deepcopy(DOCUMENT)
    document["adapters"]["another"] = document["adapters"]["odd-one"]
    message = refusal(json.dumps(document).encode())
    assert "shares slot 0 of rank 8 with another" in message


def test_a_home_of_factors_holds_so_many_ranks_and_no_more() -> None:
    """The next slots are in the next home: placement can spread them."""
    slots = {"first": 0, "last": 255, "next": 256}
    served = ServingMap.of(replace(MANIFEST, adapters={name: alone(2, slot) for name, slot in slots.items()}))
    assert {name: (own.home, own.slot) for name, own in served.adapters.items()} == {
        "first": ("factors:2.0", 0), "last": ("factors:2.0", 255), "next": ("factors:2.1", 0)
    }  # fmt: skip
    assert served.num_slots() == {"factors:2.0": 256, "factors:2.1": 1}
    assert served.members("factors:2.0") == {0: "first", 255: "last"}
    assert [factors_home(rank, 7) for rank in (64, 512, 2000)] == [
        ("factors:64.0", 7), ("factors:512.7", 0), ("factors:2000.7", 0)
    ]  # fmt: skip
    assert [factors_rank(home) for home in ("factors:64.3", "cluster:2")] == [64, None]


# --- Fuzz ---------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([BASIS, FACTORS, "core", "raw", "0", 10**400]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
ACTIONS = st.tuples(st.sampled_from(paths(DOCUMENT)), st.sampled_from(["set", "drop", "add"]), VALUES)


def valid_or_refused(data: bytes) -> None:
    try:
        manifest = parse_manifest(data, "here")
    except BundleError as error:
        assert str(error).startswith("here")
        return
    assert parse_manifest(manifest.to_json(), "again") == manifest
    for adapter in manifest.adapters.values():
        if adapter.mode == "core":
            assert 0 <= (adapter.slot or 0) < manifest.clusters[str(adapter.cluster)].num_slots
        else:
            assert adapter.factors in manifest.objects
            assert adapter.slot is not None


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.lists(ACTIONS, min_size=1, max_size=3))
def test_any_mutation_is_refused_or_a_valid_manifest(actions: list[tuple[Path, str, object]]) -> None:
    document = copy.deepcopy(DOCUMENT)
    for path, action, value in actions:
        parent: Any = document
        for key in path[:-1]:
            parent = parent.get(key) if isinstance(parent, dict) else None
        if isinstance(parent, dict):
            if action == "drop":
                parent.pop(path[-1], None)
            else:
                parent[path[-1] if action == "set" else f"{path[-1]}2"] = value
    valid_or_refused(json.dumps(document).encode())


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.integers(0, len(MANIFEST.to_json()) - 1), st.binary(min_size=1, max_size=3))
def test_any_flipped_bytes_are_refused_or_a_valid_manifest(position: int, value: bytes) -> None:
    data = MANIFEST.to_json()
    valid_or_refused(data[:position] + value + data[position + len(value) :])
