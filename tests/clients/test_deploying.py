"""A new bundle is a new deploy, which clients must not notice; one that is broken takes no healthy one's place."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from cluster.bundle.manifest import Manifest
from cluster.bundle.revisions import object_key
from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import flip_a_byte, write_bundle
from tests.support.load import NUM_TOKENS, PROMPT, Load, ask
from tests.support.serving import ENGINE, PATIENCE_S, Peft, ray_with_serve

pytestmark = pytest.mark.slow

# In the bundle before and in the new one: the same names, in other groups and with each other's weights.
BEFORE = {"0": {"a": "roman"}, "1": {"b": "number-en"}}
AFTER = {"0": {"b": "roman"}, "1": {"a": "number-en"}}
ROUTERS = 2
Bundles = tuple[Path, dict[str, Manifest]]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Bundles:
    folder = tmp_path_factory.mktemp("deploying")
    made = {}
    for name, clusters in (("before", BEFORE), ("after", AFTER), ("broken", AFTER)):
        members = {own: {to: zoo_path / source for to, source in pair.items()} for own, pair in clusters.items()}
        made[name] = write_bundle(folder / name, base_path, members, {})
    flip_a_byte(folder / "broken" / object_key(made["broken"].clusters["0"].basis))
    return folder, made


@pytest.fixture(scope="module")
def expected(bundles: Bundles, base_path: Path, zoo_path: Path) -> dict[tuple[str, str], str]:
    oracle, (_, manifests) = Peft(base_path), bundles
    return {
        (name, manifests[own].adapters[name].served): oracle.answer(zoo_path / source, PROMPT, NUM_TOKENS)
        for own, clusters in (("before", BEFORE), ("after", AFTER))
        for pair in clusters.values()
        for name, source in pair.items()
    }


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ray_with_serve(16) as port:
        yield port


@pytest.fixture
def deploy(bundles: Bundles, base_path: Path, port: int) -> Iterator[Callable[..., App]]:
    app = f"deploying-{time.monotonic_ns()}"

    def deploy(name: str, **options: Any) -> App:
        args: dict[str, Any] = {"bundle": str(bundles[0] / name), "base": str(base_path), "engine": ENGINE}
        args |= {"limits.max_batch": 16, "limits.max_model_len": 2048, "routers": ROUTERS}
        args |= {"placement.clusters_per_group": 1, "placement.devices": 2}
        serve.run(build(args | options), name=app, route_prefix=f"/{app}")
        return App(port, app, f"/{app}")

    yield deploy
    serve.delete(app)


class LongStream:
    """One that begins before a deploy and ends after it: every token of it must come."""

    def __init__(self, app: App, num_tokens: int) -> None:
        self.num_tokens, self._app = num_tokens, app
        self.said: list[str] = []
        self.has_begun = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.has_begun.wait(60)

    def _run(self) -> None:
        fields = {"model": "a", "prompt": PROMPT, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps(fields | {"max_tokens": self.num_tokens, "stream_options": {"include_usage": True}}).encode()
        with self._app.open("POST", "/v1/completions", body=body) as answer:
            for line in answer:
                self.said.append(line.decode().strip())
                self.has_begun.set()

    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def end(self) -> int:
        """How many tokens came."""
        self._thread.join(300)
        events = [line.removeprefix("data: ") for line in self.said if line.startswith("data: ")]
        assert events[-1] == "[DONE]", events[-1]
        usage: dict[str, int] = json.loads(events[-2])["usage"]
        return usage["completion_tokens"]


def served(app: App) -> str:
    bundle: str = app.call("GET", "/ready")[2]["revision"]["bundle"]
    return bundle


@pytest.mark.parametrize("clients", [8, pytest.param(32, marks=pytest.mark.by_hand)])
def test_a_new_bundle_is_deployed_without_a_gap_and_streams_longer_than_that_end_whole(
    deploy: Callable[..., App], bundles: Bundles, expected: dict[tuple[str, str], str], clients: int
) -> None:
    app, manifests = deploy("before"), bundles[1]
    with Load(app, expected, ("a", "b"), clients) as load:
        wait_until(partial(load.has_answered, clients))
        stream = LongStream(app, 400)
        began = time.monotonic()
        # Serve calls it done when what was there before has ended.
        with ThreadPoolExecutor() as pool:
            done = pool.submit(deploy, "after")
            wait_until(lambda: all(served(app) == manifests["after"].bundle for _ in range(8)), PATIENCE_S)
            took = time.monotonic() - began
            assert not stream.has_ended(), "the stream ended before the new bundle was served"
            wait_until(partial(load.has_answered, load.num_answers + 4 * clients))
            assert stream.end() == stream.num_tokens
            done.result(PATIENCE_S)
    assert not load.failed, load.failed[:5]
    assert not load.cut, load.cut[:5]
    assert len(load.served) == 4, "the load did not see both bundles"
    print(f"{load.num_answers} answers; the new bundle was served after {took:.0f} s")


@pytest.mark.by_hand
def test_a_broken_bundle_never_takes_a_healthy_ones_place(
    deploy: Callable[..., App], bundles: Bundles, expected: dict[tuple[str, str], str]
) -> None:
    app = deploy("before")
    with Load(app, expected, ("a", "b"), 4) as load:
        with pytest.raises(RuntimeError):
            deploy("broken")
        told = serve.status().applications[app.name]
        assert told.status == "DEPLOY_FAILED"
        assert "corrupt" in "".join(own.message for own in told.deployments.values())
        wait_until(partial(load.has_answered, load.num_answers + 20))
    assert not load.failed, load.failed[:5]
    assert {served(app) for _ in range(8)} == {bundles[1]["before"].bundle}


@pytest.mark.by_hand
def test_a_fresh_start_of_a_broken_bundle_is_never_running_and_says_why(
    deploy: Callable[..., App],
) -> None:
    with pytest.raises(RuntimeError):
        deploy("broken", **{"start.timeout_s": 20, "start.ready_share": 0.9})
    [told] = [own for own in serve.status().applications.values() if own.status == "DEPLOY_FAILED"]
    assert "corrupt" in told.deployments["router"].message


@pytest.mark.by_hand
def test_a_replica_that_comes_back_beside_nothing_serves_what_there_is(deploy: Callable[..., App]) -> None:
    app = deploy("broken", **{"start.ready_share": 0.5})
    wait_until(lambda: app.call("GET", "/ready")[0] == 200)
    assert sorted(ask(app, model)[0] for model in ("a", "b")) == [200, 503]
