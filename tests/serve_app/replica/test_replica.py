"""A replica whose start fails says so; it does not raise, because Serve would fail the whole application."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import EngineStopped
from serve_app.openai.call import Call, Reply
from serve_app.replica.replica import GroupReplica, ReplicaSpec
from tests.support.bundles import write_bundle


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
        homes=("factors:8.0",),
        engine="transformers",
        device="cpu",
        dtype="float32",
        max_batch=1,
        max_model_len=64,
        num_threads=1,
    )


def test_a_failed_start_is_told_by_status_and_by_every_request(spec: ReplicaSpec) -> None:
    async def check() -> None:
        replica = await start(spec)
        status = await replica.status()
        assert not status.alive
        assert "no-base" in status.homes["factors:8.0"]
        call = Call("completions", b'{"model": "add", "prompt": "x"}', "id", "add", "sha256:0")
        [refused] = [item async for item in replica.stream(call)]
        for reply in (await replica.answer(call), refused):
            assert isinstance(reply, Reply)
            assert reply.status == 503
            assert b"no-base" in reply.body

    asyncio.run(check())


def test_only_a_store_that_fails_is_worth_another_start(spec: ReplicaSpec, tmp_path: Path) -> None:
    async def check() -> None:
        another_base = tmp_path / "another"
        another_base.mkdir()
        (another_base / "config.json").write_text("{}")
        await (await start(replace(spec, base=str(another_base)))).check_health()
        unreachable = await start(replace(spec, revision=7))
        with pytest.raises(EngineStopped, match="did not start"):
            await unreachable.check_health()

    asyncio.run(check())
