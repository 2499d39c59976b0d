"""A replica whose start fails says so; it does not raise, because Serve would fail the whole application."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import manifest_key, object_key
from cluster.errors import EngineStopped
from serve_app.openai.call import Call, Reply
from serve_app.replica.replica import GroupReplica, ReplicaSpec, open_first
from serve_app.routing.following import RouterState
from tests.support.bundles import flip_a_byte, write_bundle


@pytest.fixture(autouse=True)
def in_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="here"))
    monkeypatch.setattr("serve_app.replica.replica.serve.get_replica_context", lambda: context)
    monkeypatch.setattr("serve_app.replica.replica.is_being_deployed", lambda: False)


async def start(spec: ReplicaSpec) -> GroupReplica:
    replica = GroupReplica.__new__(GroupReplica)
    await replica.__init__(spec)  # type: ignore[misc]
    return replica


@pytest.fixture
def spec(tmp_path: Path, base_path: Path, zoo_path: Path) -> ReplicaSpec:
    manifest = write_bundle(tmp_path / "out", base_path, {}, {"add": zoo_path / "add"})
    return ReplicaSpec(
        name="group-0",
        bundle=f"{tmp_path}/out/bundles/{manifest.bundle}",
        revision=0,
        base=str(tmp_path / "no-base"),
        homes={"group-0": ("factors:8.0",)},
        engine="transformers",
        device="cpu",
        dtype="float32",
        max_batch=1,
        max_model_len=64,
        num_threads=1,
    )


def test_in_a_deploy_beside_a_replica_that_serves_a_failed_start_is_raised(
    spec: ReplicaSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.replica.replica.is_being_deployed", lambda: True)
    monkeypatch.setattr("serve_app.replica.replica.has_running_replica", lambda name: name == "group-0")
    with pytest.raises(EngineStopped, match=r"group-0 did not start: .*no-base"):
        asyncio.run(start(spec))


def test_a_failed_start_is_told_by_status_and_by_every_request(spec: ReplicaSpec) -> None:
    async def check() -> None:
        replica = await start(spec)
        status = await replica.status(RouterState("router", "", None, 0))
        assert not status.health.alive
        assert "no-base" in status.reason
        call = Call("completions", b'{"model": "add", "prompt": "x"}', "id", "add", "sha256:0", 0)
        [refused] = [item async for item in replica.stream(call)]
        for reply in (await replica.answer(call), refused):
            assert isinstance(reply, Reply)
            assert reply.status == 503
            assert b"no-base" in reply.body

    asyncio.run(check())


def test_an_adapter_is_answered_at_the_revision_that_is_asked_for_or_not_at_all(
    spec: ReplicaSpec, base_path: Path
) -> None:
    async def check() -> None:
        replica = await start(replace(spec, base=str(base_path)))
        [served] = [adapter.served for adapter in Bundle.open(spec.bundle, 0).manifest.adapters.values()]
        body = b'{"model": "add", "prompt": "1 + 1 =", "max_tokens": 1}'
        asked = Call("completions", body, "id", "add", served, 0)
        assert (await replica.answer(asked)).status == 200
        for other, told in (
            (replace(asked, served="sha256:1"), served),
            (replace(asked, adapter="gone"), "not in the serving map"),
            (replace(asked, revision=3), "revision 3"),
        ):
            [refused] = [item async for item in replica.stream(other)]
            for reply in (await replica.answer(other), refused):
                assert isinstance(reply, Reply)
                assert reply.status == 503
                assert told in reply.body.decode()
        assert (await replica.answer(replace(asked, adapter=None, served="sha256:1"))).status == 200

    asyncio.run(check())


def test_only_a_store_that_fails_is_worth_another_start(spec: ReplicaSpec, tmp_path: Path) -> None:
    async def check() -> None:
        another_base = tmp_path / "another"
        another_base.mkdir()
        (another_base / "config.json").write_text("{}")
        await (await start(replace(spec, base=str(another_base)))).check_health()
        unreachable = await start(replace(spec, revision=7, follows=False))
        with pytest.raises(EngineStopped, match="did not start"):
            await unreachable.check_health()

    asyncio.run(check())


def test_a_replica_starts_with_what_can_be_read(spec: ReplicaSpec, base_path: Path, zoo_path: Path) -> None:
    out = Path(spec.bundle).parent.parent
    first = Bundle.open(spec.bundle, 0).manifest
    assert open_first(spec).number == 0
    second = write_bundle(out, base_path, {}, {"add": zoo_path / "roman"}, after=first)
    assert open_first(spec).number == 1
    flip_a_byte(out / object_key(str(second.adapters["add"].factors)))
    assert open_first(spec).number == 0
    third = write_bundle(out, base_path, {}, {"add": zoo_path / "past"}, after=second)
    (out / manifest_key(third.bundle, 2)).write_text("{}")
    assert open_first(spec).number == 0
    (out / "CURRENT").write_text("{}")
    assert open_first(spec).number == 0
    assert open_first(replace(spec, follows=False)).number == 0
