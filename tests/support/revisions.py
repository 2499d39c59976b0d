"""What both engines are tested with when revisions change: the homes of tests/support/engines.py, and a second revision
in which adapters have changed places. What each must answer is PEFT's answer for the adapter whose weights it has."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServingMap
from cluster.errors import BundleError, HomeUnavailable, StoreMissing
from serve_app.engine.protocol import Engine, GenerationRequest
from serve_app.engine.revisions import Revision
from tests.support.engines import (
    BROKEN,
    CLUSTERS,
    FACTORS,
    PROMPTS,
    Homes,
    ask,
    collect,
    cut_factors,
    lossless_cluster,
    serving_map,
    stack,
)

Oracle = dict[str | None, list[int]]
# In the second revision each of these has the weights of the other one, or of the one named.
CHANGED = {"roman": "last-letter", "last-letter": "roman", "first-letter": "date-us"}
# A home of its own, and one of a cluster's, whose others are the same in a home that is not.
GONE_IN_IT, GONE_HOME = ("date-us", "city-country"), "factors:2.1"


SHORT = 8


def _ask(name: str | None, **options: Any) -> GenerationRequest:
    return ask(name, max_tokens=SHORT, **options)


def swapped(homes: Homes, number: int = 1) -> Revision:
    """The weights of CHANGED, and without GONE_IN_IT. All other homes are as they were."""

    def load(home: str) -> LoadedHome:
        if home == "cluster:1":
            first, second = CLUSTERS[home]
            weights = lossless_cluster([homes.zoo / first, homes.zoo / second])
            return LoadedHome({name: replace(own, cores=swap(own.cores)) for name, own in weights.items()})
        if home == "factors:3.0":
            return LoadedHome(stack({4: cut_factors(homes.zoo / CHANGED["first-letter"], 2)}, 5))
        return homes.load(home)

    def swap(cores: Any) -> Any:
        return cores.flip(0)

    old = serving_map().adapters
    entries = {
        name: replace(own, served=f"sha256:{CHANGED[name]} in {number}") if name in CHANGED else own
        for name, own in old.items()
        if name not in GONE_IN_IT and name not in BROKEN
    }
    kept = tuple(home for home in (*CLUSTERS, *FACTORS) if home != GONE_HOME)
    return Revision(number, ServingMap("the-base", MappingProxyType(entries)), kept, load)


def assert_two_revisions_answer_each_as_its_own(
    runner: asyncio.Runner, engine: Engine, homes: Homes, oracle: Oracle
) -> None:
    """In one batch; again out of the prefix cache, where there is one, and at places that another one has left."""
    has_cache = type(engine).__name__ == "VllmEngine"

    async def run() -> None:
        for number in (1, 2) if has_cache else (1,):
            await engine.take_up(swapped(homes, number))
            asked: dict[str | None, Any] = {name: _ask(name, revision=0) for name in PROMPTS}
            changed = {n: _ask(n, revision=number, prompt=PROMPTS[other]) for n, other in CHANGED.items()}
            same = {name: _ask(name, revision=number) for name in ("past", "country-fr", "number-en")}
            for _ in range(2 if has_cache else 1):
                requests = [*changed.values(), *asked.values(), *same.values()]
                said = [answer.token_ids for answer in await asyncio.gather(*(collect(engine, r) for r in requests))]
                assert said[: len(changed)] == [oracle[other][:SHORT] for other in CHANGED.values()]
                assert said[len(changed) : len(changed) + len(asked)] == [oracle[name][:SHORT] for name in asked]
                assert said[len(changed) + len(asked) :] == [oracle[name][:SHORT] for name in same]
            assert set(engine.health().revisions) == {0, number}
            # The same prompt, one after the other: nothing that one revision computed is the other's.
            prompt = PROMPTS["last-letter"] + " ?" * 20
            first = [await collect(engine, ask("roman", revision=n, prompt=prompt, max_tokens=8)) for n in (0, number)]
            again = [await collect(engine, ask("roman", revision=n, prompt=prompt, max_tokens=8)) for n in (number, 0)]
            assert [answer.token_ids for answer in first] == [answer.token_ids for answer in reversed(again)]
            await engine.release(number)
            with pytest.raises(HomeUnavailable, match=f"revision {number} is not being served here"):
                await collect(engine, changed["roman"])
        assert (await collect(engine, _ask("roman"))).token_ids == oracle["roman"][:SHORT]

    runner.run(run())


def assert_a_broken_revision_changes_nothing(
    runner: asyncio.Runner, engine: Engine, homes: Homes, oracle: Oracle
) -> None:
    good = swapped(homes)

    def no_object(home: str) -> LoadedHome:
        if home == "cluster:1":
            raise StoreMissing("no object of it")
        return good.load_home(home)

    def one_is_broken(home: str) -> LoadedHome:
        loaded = good.load_home(home)
        return LoadedHome(loaded.weights, {4: "BundleError: it is corrupt"} if home == "factors:3.0" else loaded.failed)

    async def run() -> None:
        for load, told in (
            (no_object, "revision 1 is not taken up: home 'cluster:1': StoreMissing: no object of it"),
            (one_is_broken, "BundleError: .*it is corrupt"),
        ):
            with pytest.raises(BundleError, match=told):
                await engine.take_up(replace(good, load_home=load))
            assert set(engine.health().revisions) == {0}
            said = await asyncio.gather(*(collect(engine, _ask(name)) for name in PROMPTS))
            assert [answer.token_ids for answer in said] == [oracle[name][:SHORT] for name in PROMPTS]
        # What could not be asked before is no reason to refuse: "gone", and "nan" where it is seen.
        await engine.take_up(good)
        await engine.release(1)

    runner.run(run())


def assert_release_lets_running_requests_finish(
    runner: asyncio.Runner, engine: Engine, homes: Homes, oracle: Oracle
) -> None:
    async def run() -> None:
        await engine.take_up(swapped(homes))
        request = ask("roman", revision=1, prompt=PROMPTS["last-letter"], max_tokens=24, ignore_eos=True)
        alone = (await collect(engine, request)).token_ids
        stream = engine.generate(request)
        tokens = list((await anext(stream)).token_ids)
        releasing = asyncio.create_task(engine.release(1))
        await asyncio.sleep(0.05)
        assert set(engine.health().revisions) == {0}
        with pytest.raises(HomeUnavailable):
            await collect(engine, request)
        assert not releasing.done()
        # It comes again while the old one is still being run on: nothing of it may be taken away.
        await engine.take_up(swapped(homes))
        async for chunk in stream:
            tokens += chunk.token_ids
        await asyncio.wait_for(releasing, 60)
        assert tokens == alone
        assert (await collect(engine, request)).token_ids == alone
        # Who leaves early holds nothing back.
        stream = engine.generate(request)
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        await asyncio.wait_for(engine.release(1), 60)
        assert (await collect(engine, _ask("roman"))).token_ids == oracle["roman"][:SHORT]

    runner.run(run())


def assert_taking_up_again_mends(runner: asyncio.Runner, engine: Engine, homes: Homes, oracle: Oracle) -> None:
    """What failed is tried again; what still fails is told anew, and what is there is left alone."""
    first = Revision(0, serving_map(), (*CLUSTERS, *FACTORS, *BROKEN.values()), homes.load)

    def states() -> dict[str, str]:
        return engine.health().revisions[0].homes

    async def run() -> None:
        await engine.take_up(first)
        assert "connection refused" in states()[BROKEN["unreachable"]]
        homes.store_is_up = True
        await engine.take_up(first)
        assert states()[BROKEN["unreachable"]] == "ready"
        assert "model.layers.99" in states()[BROKEN["alien"]]
        answer = await collect(engine, _ask("unreachable", prompt=PROMPTS["roman"]))
        assert answer.token_ids == oracle["roman"][:SHORT]
        assert (await collect(engine, _ask("past"))).token_ids == oracle["past"][:SHORT]

    try:
        runner.run(run())
    finally:
        homes.store_is_up = False
