"""Aliases and revisions that move together: a real bundle in a folder, and replicas that say what they hold."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import pytest

from cluster.bundle.aliases import KEY, Targets, change_aliases
from cluster.bundle.manifest import Manifest
from cluster.store.local import LocalStore
from serve_app.engine.protocol import EngineHealth
from serve_app.engine.revisions import RevisionHealth
from serve_app.openai.errors import ApiError
from serve_app.routing.following import ReplicaStatus
from serve_app.routing.map_follower import MapFollower
from tests.support.bundles import write_bundle

INTERVAL_S = 0.02


class Published:
    def __init__(self, out: Path, base: Path, folder: Path) -> None:
        self.out, self._base, self._folder = out, base, folder
        self.manifest: Manifest | None = None

    def publish(self, *names: str) -> str:
        """The bundle's address."""
        members = dict.fromkeys(names, self._folder)
        self.manifest = write_bundle(self.out, self._base, {"0": members}, {}, after=self.manifest)
        return f"{self.out}/bundles/{self.manifest.bundle}"

    def alias(self, name: str, **targets: int) -> None:
        change_aliases(LocalStore(str(self.out)), lambda before: {**before, name: targets})


@pytest.fixture
def published(tmp_path: Path, base_path: Path, zoo_path: Path) -> Published:
    return Published(tmp_path / "out", base_path, zoo_path / "past")


def replica(*held: int) -> ReplicaStatus:
    return ReplicaStatus("it", "plan", EngineHealth(True, {number: RevisionHealth() for number in held}))


@contextlib.asynccontextmanager
async def following(address: str, follows: bool = True) -> AsyncIterator[MapFollower]:
    """Of revision 0, which is served."""
    follower = MapFollower(address, 0, {"group-0": ("cluster:0",)}, True, INTERVAL_S, follows)
    task = asyncio.create_task(follower.run())
    await until(lambda: follower.wanted == 0)
    await follower.consider([replica(0)])
    yield follower
    task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110  # what it waits for is told to nobody
            await asyncio.sleep(INTERVAL_S / 4)


def means(follower: MapFollower, name: str, **targets: int) -> bool:
    found: Targets | None = follower.get().targets(name)
    return found == targets


def test_an_alias_of_an_adapter_that_was_just_added_waits_for_the_switch_and_moving_it_back_does_not(
    published: Published,
) -> None:
    address = published.publish("v7", "v8")

    async def check() -> None:
        async with following(address) as follower:
            published.alias("support", v7=1)
            await until(partial(means, follower, "support", v7=1))
            published.publish("v7", "v9")
            published.alias("support", v7=20, v9=80)
            early = {"support": "as before, until revision 1 is served"}
            await until(lambda: follower.alias_faults() == early)
            await follower.consider([replica(0)])
            assert means(follower, "support", v7=1)
            # Back, or to another, at once: no revision, be it refused for ever, holds that up.
            published.alias("support", v8=1)
            await until(partial(means, follower, "support", v8=1))
            published.alias("support", v7=20, v9=80)
            await until(lambda: follower.alias_faults() == early)
            await follower.consider([replica(0, 1)])
            assert follower.get().revision == 1
            assert means(follower, "support", v7=20, v9=80)
            assert follower.alias_faults() == {}

    asyncio.run(check())


def test_a_pinned_revision_stays_and_its_aliases_are_followed(published: Published) -> None:
    address = published.publish("v7", "v8")

    async def check() -> None:
        async with following(address, follows=False) as follower:
            published.publish("v7", "v8", "v9")
            published.alias("support", v8=1)
            await until(partial(means, follower, "support", v8=1))
            await follower.consider([replica(0, 1)])
            assert follower.get().revision == 0

    asyncio.run(check())


def test_aliases_that_could_never_be_read_are_a_503_and_hold_up_no_adapter(published: Published) -> None:
    address = published.publish("v7")
    (published.out / KEY).write_text("{")

    async def check() -> None:
        async with following(address) as follower:
            await until(lambda: KEY in follower.alias_reader.state)
            assert follower.get().find("v7", b"") is not None
            with pytest.raises(
                ApiError, match="503: 'support' is no adapter, and whether it is an alias cannot be told"
            ):
                follower.get().find("support", b"")
            (published.out / KEY).unlink()
            await until(lambda: follower.get().aliases == {})
            with pytest.raises(ApiError, match="404: The model 'support' does not exist"):
                follower.get().find("support", b"")

    asyncio.run(check())
