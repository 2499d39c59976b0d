"""Publishing and reading bundles, on a folder and on a real S3 server: nothing partial, nothing unverified."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from cluster.bundle.manifest import Adapter, Base, Cluster, Manifest, Method, Refused, served_revision
from cluster.bundle.publish import missing_objects, move_current, publish, put_object
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import (
    Current,
    manifest_key,
    newest_revision,
    object_key,
    read_current,
    read_manifest,
    read_object,
)
from cluster.errors import BundleError, ConfigError, PublishConflict, StoreConflict, StoreMissing
from cluster.layer import ModuleShape
from cluster.store.address import open_store
from cluster.store.local import LocalStore
from cluster.store.protocol import Store
from infra.seaweed import S3Server
from tests.support.s3_proxy import Action, OnRequest, S3Proxy

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: ModuleShape(12, 8), V: ModuleShape(6, 8)}
R, SLOTS, RANK = 4, 2, 3
ODD = f"factors:{RANK}.0"
Tensors = dict[str, Tensor]


def tensors_of(seed: int = 0) -> dict[str, Tensors]:
    """What the bundle's three objects hold."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    basis, cores, factors = {}, {}, {}
    for name, shape in SHAPES.items():
        basis |= {f"{name}.U": draw(shape.d_out, R), f"{name}.V": draw(shape.d_in, R)}
        cores[name] = draw(SLOTS, R, R)
        factors |= {f"{name}.A": draw(RANK, shape.d_in), f"{name}.B": draw(shape.d_out, RANK)}
    return {"basis": basis, "cores": cores, "factors": factors}


def store_objects(store: Store, tensors: dict[str, Tensors]) -> Manifest:
    """Put the objects, and describe them: adapters ``one`` and ``two`` on a basis, ``odd`` by its factors."""
    stored = {name: put_object(store, held) for name, held in tensors.items()}
    basis, cores, factors = (stored[name].sha for name in ("basis", "cores", "factors"))
    errors = {"error": 0.1, "error_unweighted": 0.1, "error_worst_module": 0.2}

    def adapter(mode: str, *hashes: str, **place: object) -> Adapter:
        return Adapter("sha256:v", "etag", mode, served_revision(mode, *hashes), **errors, **place)

    return Manifest(
        bundle="",
        revision=0,
        parent=None,
        base=Base("org/tiny", "sha256:f"),
        method=Method("jd-full", 1, R, 0, "float32", 0.6),
        modules=SHAPES,
        clusters={"0": Cluster(basis, cores, SLOTS)},
        adapters={
            "one": adapter("core", basis, cores, "0", cluster="0", slot=0),
            "two": adapter("core", basis, cores, "1", cluster="0", slot=1),
            "odd": adapter("raw", factors, factors=factors, rank=RANK, slot=0),
        },
        refused={"bad": Refused("dora", "no")},
        objects={held.sha: held.size_bytes for held in stored.values()},
    ).with_own_id()


def publish_new(store: Store, seed: int = 0) -> Manifest:
    found = read_current(store)
    return publish(store, store_objects(store, tensors_of(seed)), b"{}", found[1] if found else None)


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address where nothing is published yet."""
    return str(request.getfixturevalue("s3_bucket") if request.param == "s3" else tmp_path / "out")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


@pytest.fixture
def proxy(s3_server: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


# --- What is published is read back -------------------------------------------------------------------------


def test_a_published_bundle_is_read_back_exactly(out: str) -> None:
    store = open_store(out)
    assert read_current(store) is None
    manifest = publish_new(store)
    bundle = Bundle.open(out)
    assert bundle.manifest == manifest
    assert bundle.address == f"{store.uri}/bundles/{manifest.bundle}"
    tensors = tensors_of()
    cluster, factors = bundle.load_home("cluster:0").weights, bundle.load_home(ODD).weights
    assert cluster.keys() == factors.keys() == SHAPES.keys()
    for name in SHAPES:
        assert torch.equal(cluster[name].U, tensors["basis"][f"{name}.U"])
        assert torch.equal(cluster[name].V, tensors["basis"][f"{name}.V"])
        assert torch.equal(cluster[name].cores, tensors["cores"][name])  # type: ignore[arg-type]
        assert factors[name].cores is None
        # U V^T = B A
        assert factors[name].rows.tolist() == [0]  # type: ignore[union-attr]
        assert torch.equal(factors[name].U[0], tensors["factors"][f"{name}.B"])
        assert torch.equal(factors[name].V[0], tensors["factors"][f"{name}.A"].T)
    keys = [entry.key for entry in store.list()]
    revision = f"bundles/{manifest.bundle}/revisions/0"
    assert set(keys) == {
        "CURRENT", f"{revision}/manifest.json", f"{revision}/report.json", *map(object_key, manifest.objects)
    }  # fmt: skip
    assert bundle.home_bytes("cluster:0") + bundle.home_bytes(ODD) == sum(
        store.head(object_key(sha)).size_bytes for sha in manifest.objects
    )


def stack_of(store: Store, held: dict[str, Tensors]) -> Bundle:
    """Published, with an adapter for each of ``held``, in its order the slots 0, 2, 4, ..., all in one home."""
    manifest = store_objects(store, tensors_of())
    adapters, objects = {}, dict(manifest.objects)
    for number, (name, tensors) in enumerate(held.items()):
        stored = put_object(store, tensors)
        objects[stored.sha] = stored.size_bytes
        adapters[name] = replace(manifest.adapters["odd"], factors=stored.sha, rank=RANK, slot=2 * number)
    publish(store, replace(manifest, adapters=adapters, objects=objects).with_own_id(), b"{}", None)
    return Bundle.open(store.uri)


def factors_of(seed: int, *modules: str, rank: int = RANK, dtype: torch.dtype = torch.float32) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        A = torch.randn(rank, SHAPES[module].d_in, generator=generator)
        B = torch.randn(SHAPES[module].d_out, rank, generator=generator)
        tensors |= {f"{module}.A": A.to(dtype), f"{module}.B": B.to(dtype)}
    return tensors


def test_adapters_that_differ_in_modules_rank_and_dtype_are_read_into_one_stack(local: Store) -> None:
    held = {
        "whole": factors_of(0, Q, V),
        "smaller": factors_of(1, Q, V, rank=1),
        "same": factors_of(2, Q, V),
        "one-module": factors_of(3, V),
        "rounded": factors_of(4, Q, V, dtype=torch.bfloat16),
        "half-rounded": factors_of(5, Q, V) | {f"{Q}.A": factors_of(5, Q)[f"{Q}.A"].bfloat16()},
    }
    bundle = stack_of(local, held)
    loaded = bundle.load_home(ODD)
    assert not loaded.failed
    for slot, tensors in zip(range(0, 12, 2), held.values(), strict=True):
        for module in SHAPES:
            own = loaded.weights[module]
            assert own.rows is not None
            row = int(own.rows[slot])
            seen = own.U[row] @ own.V[row].T
            wanted = torch.zeros_like(seen)
            if f"{module}.A" in tensors:
                wanted = tensors[f"{module}.B"].float() @ tensors[f"{module}.A"].float()
            torch.testing.assert_close(seen, wanted)
    for slot in (1, 3, 5, 7):
        assert not loaded.weights[Q].U[loaded.weights[Q].rows[slot]].any(), "nobody's slot is zero"  # type: ignore[index]
    for adapter_id, tensors in held.items():
        own_factors = bundle.load_factors(adapter_id)
        assert {f"{m}.{n}": t for m, pair in own_factors.items() for n, t in zip("AB", pair, strict=True)}.keys() == (
            tensors.keys()
        )
        assert all(torch.equal(A, tensors[f"{module}.A"]) for module, (A, _) in own_factors.items())


def test_a_bundle_has_one_id_whatever_slots_those_that_stand_alone_have(local: Store) -> None:
    """As of manifests that were written before they had any."""
    manifest = stack_of(local, {"a": factors_of(0, Q), "b": factors_of(1, Q)}).manifest
    moved = {name: replace(adapter, slot=7 - int(adapter.slot or 0)) for name, adapter in manifest.adapters.items()}
    assert replace(manifest, adapters=moved).with_own_id().bundle == manifest.bundle


def test_an_adapter_that_cannot_be_read_takes_no_other_of_its_home_with_it(local: Store) -> None:
    held = {name: factors_of(seed, Q, V) for seed, name in enumerate(("good", "corrupt", "gone", "fine"))}
    held["misfit"] = factors_of(9, Q, V) | {f"{Q}.A": torch.ones(RANK, 9)}
    held["misfit-too"] = {name: 2 * tensor for name, tensor in held["misfit"].items()}
    # A larger rank than the manifest's would be everybody's: a stack is as wide as its widest.
    held["too-wide"] = factors_of(10, Q, V, rank=RANK + 1)
    held["empty"] = {}
    held["eighth"] = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in factors_of(11, Q).items()}
    bundle = stack_of(local, held)
    adapters = bundle.manifest.adapters
    key = object_key(str(adapters["corrupt"].factors))
    local.write(key, local.read(key).data[:-1] + b"x")
    local.delete(object_key(str(adapters["gone"].factors)))
    loaded = bundle.load_home(ODD)
    assert loaded.failed.keys() == {2, 4, 8, 10, 12, 14, 16}
    assert f"adapter too-wide of {bundle.address}: tensor {Q}.A is of rank {RANK + 1}" in loaded.failed[12]
    assert "holds no tensor" in loaded.failed[14]
    assert "float8" in loaded.failed[16]
    assert loaded.failed[2].startswith("BundleError: adapter corrupt of")
    assert "is corrupt" in loaded.failed[2]
    assert loaded.failed[4].startswith("StoreMissing: ")
    for slot, name in ((8, "misfit"), (10, "misfit-too")):
        assert f"adapter {name} of {bundle.address}: tensor {Q}.A" in loaded.failed[slot]
    for slot, name in ((0, "good"), (6, "fine")):
        for module, own in loaded.weights.items():
            row = own.rows[slot]  # type: ignore[index]
            assert torch.equal(own.U[row], held[name][f"{module}.B"])


def test_diagonal_cores_are_read_back(local: Store) -> None:
    tensors = tensors_of()
    tensors["cores"] = {name: torch.ones(SLOTS, R) * 2 for name in SHAPES}
    publish(local, store_objects(local, tensors), b"{}", None)
    assert torch.equal(Bundle.open(local.uri).load_home("cluster:0").weights[Q].cores, tensors["cores"][Q])  # type: ignore[arg-type]


def test_publishing_the_same_again_writes_no_second_revision(local: Store) -> None:
    first = publish_new(local)
    content = {entry.key: local.read(entry.key).data for entry in local.list()}
    other_etags = {name: replace(adapter, etag="again") for name, adapter in first.adapters.items()}
    again = publish(local, replace(first, adapters=other_etags), b"{}", read_current(local)[1])  # type: ignore[index]
    assert again == first
    now = {entry.key: local.read(entry.key).data for entry in local.list()}
    assert {key: data for key, data in now.items() if key != "CURRENT"} == {
        key: data for key, data in content.items() if key != "CURRENT"
    }


def test_an_address_that_names_the_bundle_stays_with_it(out: str) -> None:
    store = open_store(out)
    old = publish_new(store, seed=0)
    new = publish_new(store, seed=1)
    assert old.bundle != new.bundle
    assert Bundle.open(out).manifest == new
    for address in (f"{out}/bundles/{old.bundle}", f"{out}/bundles/{old.bundle}/"):
        assert Bundle.open(address).manifest == old
    reopened = Bundle.open(Bundle.open(out).address)
    assert reopened.manifest == new


def test_a_pinned_bundle_is_opened_at_currents_revision_of_it_or_the_one_asked_for(local: Store) -> None:
    """CURRENT's where CURRENT names this bundle: a rollback holds for who pins the bundle. Else its newest."""
    first = publish_new(local)
    address = f"{local.uri}/bundles/{first.bundle}"
    for revision in (2, 10, 9):
        later = replace(first, revision=revision, parent=0)
        local.create(manifest_key(first.bundle, revision), later.to_json())
    local.write(f"bundles/{first.bundle}/revisions/11/report.json", b"{}")  # without a manifest it does not exist
    local.write(f"bundles/{first.bundle}/revisions/x/manifest.json", b"{}")
    assert newest_revision(local, first.bundle) == 10
    assert Bundle.open(address).manifest == first
    assert Bundle.open(address, 2).manifest == replace(first, revision=2, parent=0)
    assert Bundle.open(local.uri).manifest == first
    with pytest.raises(StoreMissing, match="revisions/11"):
        Bundle.open(address, 11)
    with pytest.raises(ConfigError, match="needs the bundle"):
        Bundle.open(local.uri, 2)
    publish_new(local, seed=1)  # CURRENT is another bundle's
    assert Bundle.open(address).manifest.revision == 10


def test_what_was_never_published_is_missing_by_name(local: Store) -> None:
    with pytest.raises(StoreMissing, match="no CURRENT there; run the compression job"):
        Bundle.open(local.uri)
    publish_new(local)
    with pytest.raises(StoreMissing, match=f"no bundle 'b-{'0' * 16}'"):
        Bundle.open(f"{local.uri}/bundles/b-{'0' * 16}")


def test_a_bucket_that_is_not_there_is_told_from_one_without_a_bundle(s3_bucket: str) -> None:
    with pytest.raises(StoreMissing, match="NoSuchKey"):
        Bundle.open(s3_bucket)
    with pytest.raises(StoreMissing, match=r"s3://no-such-bucket/out: .*NoSuchBucket.*create the bucket"):
        Bundle.open("s3://no-such-bucket/out")


def test_an_unknown_home_is_refused_by_name(local: Store) -> None:
    publish_new(local)
    bundle = Bundle.open(local.uri)
    for home in ("cluster:1", "cluster:", "factors:3.1", "factors:2.0", "factors:odd", "odd", "", "other:0"):
        with pytest.raises(BundleError, match=f"no home {home!r} in revision 0"):
            bundle.load_home(home)


# --- What is not what the job wrote -------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["basis", "cores", "factors"])
@pytest.mark.parametrize("position", [0, 5, 200, -1])
def test_a_corrupt_byte_is_found_and_only_its_home_suffers(local: Store, held: str, position: int) -> None:
    publish_new(local)
    sha = put_object(local, tensors_of()[held]).sha
    data = bytearray(local.read(object_key(sha)).data)
    data[position] ^= 1
    local.write(object_key(sha), bytes(data))
    bundle = Bundle.open(local.uri)
    bad, good = (ODD, "cluster:0") if held == "factors" else ("cluster:0", ODD)
    with pytest.raises(BundleError, match=r"objects/[0-9a-f]{64}\.safetensors is corrupt.*run the compression job"):
        bundle.load_home(bad)
    assert bundle.load_home(good).weights.keys() == SHAPES.keys()


def test_an_object_cut_short_or_gone_is_named(local: Store) -> None:
    manifest = publish_new(local)
    key = object_key(manifest.clusters["0"].cores)
    local.write(key, local.read(key).data[:-1])
    with pytest.raises(BundleError, match=r"cluster 0 of .* is corrupt"):
        Bundle.open(local.uri).load_home("cluster:0")
    local.delete(key)
    with pytest.raises(StoreMissing, match=key):
        Bundle.open(local.uri).load_home("cluster:0")


def test_bytes_of_the_right_hash_that_are_no_safetensors_are_refused(local: Store) -> None:
    from hashlib import sha256

    for data in (b"", b"no tensors", (10**12).to_bytes(8, "little")):
        sha = f"sha256:{sha256(data).hexdigest()}"
        local.write(object_key(sha), data)
        with pytest.raises(BundleError, match=r"here: object .* is not safetensors"):
            read_object(local, sha, "here")


def _without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def _with(name: str, tensor: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("held", "edit", "seen"),
    [
        ("basis", _without(f"{Q}.U"), f"{Q}.U' is missing"),
        ("basis", _without(f"{V}.V"), f"{V}.V' is missing"),
        ("cores", _without(Q), "basis holds 4 tensors for 1 modules"),
        ("basis", _with("other.U", torch.ones(1)), "basis holds 5 tensors for 2 modules"),
        ("cores", _with("other", torch.ones(SLOTS, R)), "other.U' is missing"),
        ("basis", _with(f"{Q}.U", torch.ones(13, R)), "expected (12, 4)"),
        ("basis", _with(f"{Q}.U", torch.ones(12, R + 1)), f"{Q} is torch.float32 (2, 4, 4), expected (2, 5, 4)"),
        ("basis", _with(f"{Q}.V", torch.ones(9, R)), f"{Q}.V is torch.float32 (9, 4), expected (8, 4)"),
        ("basis", _with(f"{Q}.V", torch.ones(8)), "factors of 2 and 1 dimensions"),
        ("basis", _with(f"{Q}.U", torch.ones(12, R, dtype=torch.int32)), "torch.int32 (12, 4)"),
        ("cores", _with(Q, torch.ones(SLOTS - 1, R, R)), f"{Q} is torch.float32 (1, 4, 4), expected (2, 4, 4)"),
        ("cores", _with(Q, torch.ones(SLOTS, R, R + 1)), "expected (2, 4, 4)"),
        ("cores", _with(Q, torch.ones(SLOTS, R - 1)), "(2, 3), expected (2, 4)"),
        ("cores", _with(Q, torch.ones(SLOTS)), "(2,), expected (2, 4, 4)"),
        ("factors", _without(f"{Q}.A"), f"{Q}.A' is missing"),
        ("factors", _without(f"{V}.B"), f"{V}.B' is missing"),
        ("factors", _with(f"{Q}.A", torch.ones(RANK, 9)), "expected (3, 8)"),
        ("factors", _with(f"{Q}.B", torch.ones(12, RANK + 1)), "expected (12, 3)"),
        ("factors", _with("plain", torch.ones(1)), "is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_manifest_are_refused_by_name(
    local: Store, held: str, edit: Callable[[Tensors], object], seen: str
) -> None:
    tensors = tensors_of()
    edit(tensors[held])
    publish(local, store_objects(local, tensors), b"{}", None)
    where, home = ("adapter odd of", ODD) if held == "factors" else ("cluster 0 of", "cluster:0")
    with pytest.raises(BundleError) as caught:
        Bundle.open(local.uri).load_home(home)
    assert str(caught.value).startswith(where)
    assert seen in str(caught.value)


@pytest.mark.parametrize("home", ["cluster:0", ODD])
def test_tensors_of_a_module_that_is_not_listed_are_refused(local: Store, home: str) -> None:
    manifest = replace(store_objects(local, tensors_of()), modules={Q: SHAPES[Q]}).with_own_id()
    publish(local, manifest, b"{}", None)
    with pytest.raises(BundleError, match=f"module '{V}', which the manifest does not list"):
        Bundle.open(local.uri).load_home(home)


def test_a_moved_or_copied_manifest_is_refused(local: Store) -> None:
    manifest = publish_new(local)
    other = "b-" + "0" * 16
    data = local.read(manifest_key(manifest.bundle, 0)).data
    for key, bundle, revision in [
        (manifest_key(other, 0), other, 0),
        (manifest_key(manifest.bundle, 1), manifest.bundle, 1),
    ]:
        local.write(key, data)
        with pytest.raises(BundleError, match=f"calls itself {manifest.bundle} revision 0"):
            read_manifest(local, bundle, revision)
    with pytest.raises(BundleError, match="cannot be moved or copied"):
        Bundle.open(f"{local.uri}/bundles/{manifest.bundle}", 1)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"garbage", b"\xff\xfe", b"null", b"[]", b'"b-0"', b"{}", b"[" * 100_000,
        b'{"bundle": "b-0123456789abcdef", "revision": 0}',
        b'{"bundle": "b-0123456789abcdef", "revision": "0", "token": "t"}',
        b'{"bundle": "b-0123456789abcdef", "revision": -1, "token": "t"}',
        b'{"bundle": "b-0123456789abcdef", "revision": true, "token": "t"}',
        b'{"bundle": "b-0123456789abcdef", "revision": Infinity, "token": "t"}',
        b'{"bundle": "b-0123456789abcdef", "revision": 0, "token": "t", "more": 1}',
        b'{"bundle": "../../elsewhere", "revision": 0, "token": "t"}',
        b'{"bundle": null, "revision": 0, "token": "t"}',
    ],
)  # fmt: skip
def test_garbage_in_current_is_told_and_never_overwritten(local: Store, data: bytes) -> None:
    manifest = publish_new(local)
    local.write("CURRENT", data)
    for read in (lambda: read_current(local), lambda: Bundle.open(local.uri), lambda: publish_new(local, seed=1)):
        with pytest.raises(BundleError, match=r"CURRENT is b.*expected bundle, revision and token as JSON"):
            read()
    assert local.read("CURRENT").data == data
    assert Bundle.open(f"{local.uri}/bundles/{manifest.bundle}").manifest == manifest


def test_a_current_that_leads_nowhere_is_missing(local: Store) -> None:
    manifest = publish_new(local)
    local.delete(manifest_key(manifest.bundle, 0))
    with pytest.raises(StoreMissing, match=manifest.bundle):
        Bundle.open(local.uri)


# --- Publishing ---------------------------------------------------------------------------------------------


def test_put_object_stores_under_the_hash_of_its_bytes_and_makes_what_is_there_young_again(out: str) -> None:
    from hashlib import sha256

    store = open_store(out)
    tensors = tensors_of()["basis"]
    stored = put_object(store, tensors)
    blob, before = store.read(object_key(stored.sha)), store.head(object_key(stored.sha))
    assert stored.sha == f"sha256:{sha256(blob.data).hexdigest()}"
    assert stored.size_bytes == len(blob.data)
    assert load_tensors(blob.data).keys() == tensors.keys()
    time.sleep(1.1)  # S3 tells whole seconds
    assert put_object(store, dict(reversed(tensors.items()))) == stored
    assert store.head(object_key(stored.sha)).modified_s > before.modified_s
    assert store.read(object_key(stored.sha)).data == blob.data
    assert [entry.key for entry in store.list()] == [object_key(stored.sha)]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""])
def test_put_object_repairs_a_corrupt_object(out: str, damage: Callable[[bytes], bytes]) -> None:
    store = open_store(out)
    stored = put_object(store, tensors_of()["basis"])
    key = object_key(stored.sha)
    data = store.read(key).data
    store.write(key, damage(data))
    assert store.read(key).data != data
    assert put_object(store, tensors_of()["basis"]) == stored
    assert store.read(key).data == data


def test_put_object_takes_views(local: Store) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    stored = put_object(local, {"a": whole.T, "b": whole[:, ::2].clone()})
    assert torch.equal(read_object(local, stored.sha, "here")["a"], whole.T)


def test_publish_refuses_while_objects_are_missing_or_of_another_size(local: Store) -> None:
    manifest = store_objects(local, tensors_of())
    assert missing_objects(local, manifest) == []
    first, second = sorted(manifest.objects)[:2]
    local.delete(object_key(first))
    local.write(object_key(second), b"short")
    assert missing_objects(local, manifest) == [first, second]
    with pytest.raises(BundleError, match=f"2 objects of {manifest.bundle} are missing, such as {first}"):
        publish(local, manifest, b"{}", None)
    assert {entry.key.split("/")[0] for entry in local.list()} == {"objects"}  # nothing of it is visible


def test_a_job_that_comes_too_late_says_so_and_moves_nothing(out: str) -> None:
    store = open_store(out)
    began = publish_new(store, seed=0)
    seen = read_current(store)
    assert seen is not None
    faster = publish_new(store, seed=1)
    slower = store_objects(store, tensors_of(2))
    for etag in (seen[1], None):  # it saw the first, or none at all
        with pytest.raises(PublishConflict) as caught:
            publish(store, slower, b"{}", etag)
        assert f"CURRENT was moved to bundle {faster.bundle} revision 0 by another job" in str(caught.value)
        assert f"bundle {slower.bundle} is complete but not current: run the job again" in str(caught.value)
    assert Bundle.open(out).manifest == faster
    for manifest in (began, slower):
        assert Bundle.open(f"{out}/bundles/{manifest.bundle}").manifest == manifest


def test_a_current_that_was_deleted_meanwhile_is_a_conflict(local: Store) -> None:
    manifest = publish_new(local)
    seen = read_current(local)
    assert seen is not None
    local.delete("CURRENT")
    with pytest.raises(PublishConflict, match="moved to nothing"):
        move_current(local, manifest, seen[1])
    assert read_current(local) is None


def test_two_jobs_that_publish_the_same_bundle_do_not_conflict(local: Store) -> None:
    manifest = store_objects(local, tensors_of())
    assert publish(local, manifest, b"{}", None) == publish(local, manifest, b"{}", None) == manifest


@pytest.mark.parametrize("from_nothing", [True, False])
def test_of_jobs_racing_for_current_exactly_one_wins(out: str, from_nothing: bool) -> None:
    setup, *stores = [open_store(out) for _ in range(3)]
    for round_ in range(2):
        if from_nothing:
            setup.delete("CURRENT")
        elif round_ == 0:
            publish_new(setup, seed=99)
        found = read_current(setup)
        seen = found[1] if found else None
        manifests = [store_objects(setup, tensors_of(10 * round_ + racer)) for racer in range(len(stores))]
        start = threading.Barrier(len(stores))

        def race(
            store: Store, manifest: Manifest, start: threading.Barrier = start, seen: str | None = seen
        ) -> Manifest | PublishConflict:
            store.create(manifest_key(manifest.bundle, 0), manifest.to_json())
            start.wait()
            try:
                move_current(store, manifest, seen)
            except PublishConflict as conflict:
                return conflict
            return manifest

        with ThreadPoolExecutor(len(stores)) as pool:
            results = list(pool.map(race, stores, manifests))
        (winner,) = [result for result in results if isinstance(result, Manifest)]
        assert Bundle.open(out).manifest == winner
        for manifest, result in zip(manifests, results, strict=True):
            assert Bundle.open(f"{out}/bundles/{manifest.bundle}").manifest == manifest  # complete all the same
            if isinstance(result, PublishConflict):
                assert winner.bundle in str(result)


def child_of(manifest: Manifest, revision: int, error: float) -> Manifest:
    """A later revision over the same objects, told apart by one figure."""
    adapters = {**manifest.adapters, "one": replace(manifest.adapters["one"], error=error)}
    return replace(manifest, revision=revision, parent=manifest.revision, adapters=adapters)


def test_of_two_jobs_that_make_the_same_revision_one_wins_and_the_other_says_so(out: str) -> None:
    store = open_store(out)
    first = publish_new(store)
    seen = read_current(store)
    assert seen is not None
    ours, theirs = child_of(first, 1, 0.2), child_of(first, 1, 0.3)
    assert publish(store, theirs, b"{}", seen[1]) == theirs
    with pytest.raises(PublishConflict, match=f"revision 1 of bundle {first.bundle} was published by another job"):
        publish(store, ours, b"{}", seen[1])
    assert Bundle.open(out).manifest == theirs
    # The very same content is no conflict: what was to be published is.
    assert publish(store, theirs, b"{}", seen[1]) == theirs


def test_objects_that_vanish_while_publishing_leave_current_and_no_manifest(local: Store) -> None:
    """A store in which another process deletes an object just after the manifest is written."""
    first = publish_new(local)
    seen = read_current(local)
    assert seen is not None
    second = store_objects(local, tensors_of(1))

    class Vanishing(LocalStore):
        def create(self, key: str, data: bytes) -> str:
            etag = super().create(key, data)
            super().delete(object_key(max(second.objects)))
            return etag

    with pytest.raises(BundleError, match=f"1 objects of {second.bundle} are missing, such as {max(second.objects)}"):
        publish(Vanishing(local.uri), second, b"{}", seen[1])
    assert Bundle.open(local.uri).manifest == first
    assert not list(local.list(f"bundles/{second.bundle}/"))


# --- Answers that get lost on the way -----------------------------------------------------------------------


def _lose_first_put(ending: str) -> OnRequest:
    """The server does it, the client hears nothing; the client's retry then meets its own first try."""
    lost = False

    def decide(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal lost
        if lost or method != "PUT" or ending not in path:
            return Action.FORWARD
        lost = True
        return Action.FORWARD_THEN_DROP

    return decide


@pytest.mark.parametrize("ending", ["CURRENT", "manifest.json", "report.json", "objects/"])
@pytest.mark.parametrize("from_nothing", [True, False])
def test_a_lost_answer_is_recognised_as_won(s3_bucket: str, proxy: S3Proxy, ending: str, from_nothing: bool) -> None:
    store = open_store(s3_bucket)
    if not from_nothing:
        publish_new(store, seed=1)
    proxy.seen.clear()
    proxy.on_request = _lose_first_put(ending)
    manifest = publish_new(store, seed=0)
    assert sum(action is Action.FORWARD_THEN_DROP for _, _, action in proxy.seen) == 1
    assert Bundle.open(s3_bucket).manifest == manifest
    if ending == "CURRENT":
        puts = [action for method, path, action in proxy.seen if method == "PUT" and path.endswith("CURRENT")]
        assert puts == [Action.FORWARD_THEN_DROP, Action.FORWARD]


def test_the_lost_answer_of_a_later_revision_is_recognised_as_our_own(s3_bucket: str, proxy: S3Proxy) -> None:
    store = open_store(s3_bucket)
    first = publish_new(store)
    seen = read_current(store)
    assert seen is not None
    proxy.seen.clear()
    proxy.on_request = _lose_first_put("manifest.json")
    second = child_of(first, 1, 0.2)
    assert publish(store, second, b"{}", seen[1]) == second
    assert sum(action is Action.FORWARD_THEN_DROP for _, _, action in proxy.seen) == 1
    assert Bundle.open(s3_bucket).manifest == second


def test_a_lost_answer_after_which_another_job_won_is_a_conflict(
    s3_bucket: str, proxy: S3Proxy, s3_server: S3Server
) -> None:
    store = open_store(s3_bucket)
    ours, theirs = store_objects(store, tensors_of(0)), publish_new(store, seed=1)
    first = read_current(store)
    assert first is not None
    bucket, _, prefix = s3_bucket.removeprefix("s3://").partition("/")
    lose, client, retried = _lose_first_put("CURRENT"), s3_server.client(), False

    def decide(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal retried
        action = lose(method, path, headers)
        if method == "PUT" and path.endswith("CURRENT") and action is Action.FORWARD and not retried:
            retried = True  # between our first try and our second, the other job saw ours and moved on
            body = json.dumps({"bundle": theirs.bundle, "revision": 0, "token": "theirs"}).encode()
            client.put_object(Bucket=bucket, Key=f"{prefix}/CURRENT", Body=body)
        return action

    proxy.on_request = decide
    with pytest.raises(PublishConflict, match=f"moved to bundle {theirs.bundle}"):
        publish(store, ours, b"{}", first[1])
    assert retried
    found = read_current(store)
    assert found is not None
    assert found[0] == Current(theirs.bundle, 0, "theirs")


def test_current_is_only_ever_moved_by_conditional_writes(s3_bucket: str, proxy: S3Proxy) -> None:
    conditions: list[set[str]] = []

    def note(method: str, path: str, headers: dict[str, str]) -> Action:
        if method == "PUT" and path.endswith("CURRENT"):
            conditions.append({"if-match", "if-none-match"} & set(headers))
        return Action.FORWARD

    proxy.on_request = note
    store = open_store(s3_bucket)
    publish_new(store, seed=0)
    publish_new(store, seed=1)
    assert conditions == [{"if-none-match"}, {"if-match"}]
    with pytest.raises(StoreConflict):
        store.create("CURRENT", b"")
