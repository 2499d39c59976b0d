"""The bundle changes under a running application: real Serve, engine and base, CURRENT moved under load.

What an answer must be is PEFT's with the adapter's folder, by the revision that the answer itself names.
"""

from __future__ import annotations

import contextlib
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve

from cluster.bundle.manifest import Manifest
from cluster.bundle.revisions import manifest_key, object_key
from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import flip_a_byte, move_current, write_bundle
from tests.support.load import NUM_TOKENS, PROMPT, Load, ask
from tests.support.serving import ENGINE, Peft, ray_with_serve

pytestmark = pytest.mark.slow

INTERVAL_S = 0.5
FOLDERS = ("roman", "number-en", "country-fr", "past", "last-letter")
LIMITS: dict[str, Any] = {"limits.max_batch": 8, "limits.max_model_len": 512}


@dataclass
class Revisions:
    """Of one bundle, each with adapters of other folders. ``expected``: (adapter, served revision) -> its answer."""

    out: Path
    base: Path
    zoo: Path
    answers: dict[str, str]
    room: tuple[str, ...] = ("roman", "number-en", "country-fr")
    manifests: list[Manifest] = field(default_factory=list)
    expected: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, cluster: dict[str, str], raw: dict[str, str]) -> Manifest:
        """Adapter -> the folder whose weights it has."""
        manifest = write_bundle(
            self.out,
            self.base,
            {"0": {name: self.zoo / own for name, own in cluster.items()}},
            {name: self.zoo / own for name, own in raw.items()},
            room={"0": [self.zoo / own for own in self.room]},
            after=self.manifests[-1] if self.manifests else None,
        )
        self.manifests.append(manifest)
        for name, own in (cluster | raw).items():
            self.expected[name, manifest.adapters[name].served] = self.answers[own]
        return manifest


@pytest.fixture(scope="module")
def answers(base_path: Path, zoo_path: Path) -> dict[str, str]:
    """Folder -> PEFT's answer to PROMPT."""
    oracle = Peft(base_path)
    said = {name: oracle.answer(zoo_path / name, PROMPT, NUM_TOKENS) for name in FOLDERS}
    assert len(set(said.values())) == len(said), "the oracle must tell adapters apart"
    return said


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ray_with_serve() as port:
        yield port


@pytest.fixture
def revisions(tmp_path: Path, base_path: Path, zoo_path: Path, answers: dict[str, str]) -> Revisions:
    made = Revisions(tmp_path / "out", base_path, zoo_path, answers)
    made.add({"a": "roman", "b": "number-en"}, {"c": "past"})
    return made


@pytest.fixture
def deploy(revisions: Revisions, port: int) -> Iterator[Callable[..., App]]:
    names = []

    def deploy(is_strict: bool = True, **options: Any) -> App:
        name = f"following-{time.monotonic_ns()}"
        args = {"bundle": str(revisions.out), "base": str(revisions.base), "engine": ENGINE, **LIMITS}
        serve.run(build(args | {"refresh_interval_s": INTERVAL_S} | options), name=name, route_prefix=f"/{name}")
        names.append(name)
        app = App(port, name, f"/{name}")
        wait_until(lambda: is_ready(app) or (not is_strict and bool(replicas(app))))
        return app

    def is_ready(app: App) -> bool:
        return all(app.call("GET", "/ready?all=1")[0] == 200 for _ in range(8))  # by every router that there may be

    yield deploy
    for name in names:
        serve.delete(name)


def serving(app: App) -> int | None:
    revision: int | None = app.call("GET", "/ready")[2]["revision"]["serving"]
    return revision


def assert_answers(app: App, revisions: Revisions, manifest: Manifest) -> None:
    """Every adapter of the revision, and no other, as PEFT does."""
    for name, adapter in manifest.adapters.items():
        expected = 200, adapter.served, revisions.expected[name, adapter.served]
        assert ask(app, name) == ask(app, name, stream=True) == expected, name
    for gone in {name for name, _ in revisions.expected} - manifest.adapters.keys():
        assert ask(app, gone)[0] == 404
    listed = {card["id"] for card in app.call("GET", "/v1/models")[2]["data"]}
    assert listed - {manifest.base.name} == manifest.adapters.keys()


def replicas(app: App) -> set[str]:
    return {name for group in app.call("GET", "/ready")[2]["groups"].values() for name in group["replicas"]}


def test_added_updated_removed_and_rolled_back_adapters_are_served_without_a_restart(
    deploy: Callable[..., App], revisions: Revisions
) -> None:
    app, first = deploy(), revisions.manifests[0]
    assert_answers(app, revisions, first)
    before = replicas(app)
    for cluster, raw in (
        ({"a": "roman", "b": "number-en", "d": "country-fr"}, {"c": "past", "e": "last-letter"}),  # added
        ({"a": "country-fr", "b": "number-en", "d": "roman"}, {"c": "last-letter", "e": "past"}),  # updated
        ({"b": "number-en"}, {}),  # removed
    ):
        manifest = revisions.add(cluster, raw)
        wait_until(partial(is_served, app, manifest.revision))
        assert_answers(app, revisions, manifest)
    move_current(revisions.out, first)
    wait_until(partial(is_served, app, 0))
    assert_answers(app, revisions, first)
    assert replicas(app) == before
    # The newest that was served is 3, and 0 is again: told as what it is, not as it came.
    wait_until(lambda: gauge("cts_revision", "served", app) == gauge("cts_revision", "wanted", app) == 0)
    assert gauge("cts_replicas_behind", "group-0", app) == 0


def gauge(name: str, tag: str, app: App) -> float | None:
    """As Prometheus would read it from Ray's own port."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    own = [line for line in lines if name in line and f'"{tag}"' in line and f'"{app.name}"' in line]
    return float(own[-1].rpartition(" ")[2]) if own else None


def held(app: App) -> list[list[int]]:
    groups = app.call("GET", "/ready")[2]["groups"].values()
    return [own["revisions"] for group in groups for own in group["replicas"].values()]


def test_a_broken_revision_is_refused_with_its_reason_and_the_old_one_goes_on(
    deploy: Callable[..., App], revisions: Revisions
) -> None:
    app, first = deploy(), revisions.manifests[0]
    broken = revisions.add({"a": "country-fr"}, {})
    flip_a_byte(revisions.out / object_key(broken.clusters["0"].cores))
    wait_until(partial(is_refused, app, 1))
    told = app.call("GET", "/ready")[2]
    assert "corrupt" in told["map"]
    assert (told["revision"]["serving"], told["revision"]["wanted"]) == (0, 1)
    assert_answers(app, revisions, first)
    # No manifest at all, and one that is none: nothing is known of these but their numbers.
    unread = revisions.add({"a": "country-fr"}, {})
    (revisions.out / manifest_key(unread.bundle, unread.revision)).write_text("{}")
    wait_until(lambda: "revisions/2/manifest.json" in app.call("GET", "/ready")[2]["map"])
    assert_answers(app, revisions, first)
    good = revisions.add({"a": "country-fr", "b": "number-en"}, {"c": "past"})
    wait_until(partial(is_served, app, good.revision))
    assert_answers(app, revisions, good)
    assert app.call("GET", "/ready")[2]["map"] == "loaded"
    # What no router serves any more is released.
    wait_until(lambda: all(own == [good.revision] for own in held(app)))


def test_current_that_moves_to_another_bundle_or_is_damaged_leaves_what_is_served(
    deploy: Callable[..., App], revisions: Revisions
) -> None:
    app = deploy()
    second = revisions.add({"a": "country-fr", "b": "roman"}, {})
    wait_until(partial(is_served, app, second.revision))
    move_current(revisions.out, replace(second, bundle="b-" + "0" * 16, revision=0))
    time.sleep(4 * INTERVAL_S)
    assert_answers(app, revisions, second)
    (revisions.out / "CURRENT").write_text("{}")
    wait_until(lambda: "CURRENT is" in app.call("GET", "/ready")[2]["map"])
    assert_answers(app, revisions, second)
    # To the first one, which is number 0.
    move_current(revisions.out, revisions.manifests[0])
    wait_until(partial(is_served, app, 0))
    assert_answers(app, revisions, revisions.manifests[0])


def test_a_replica_that_starts_beside_a_broken_revision_brings_nobody_over_to_it(
    deploy: Callable[..., App], revisions: Revisions
) -> None:
    app, first = deploy(), revisions.manifests[0]
    broken = revisions.add({"a": "country-fr"}, {})
    flip_a_byte(revisions.out / object_key(broken.clusters["0"].cores))
    wait_until(partial(is_refused, app, 1))
    (before,) = replicas(app)
    kill_replicas(app)
    wait_until(lambda: replicas(app) and before not in replicas(app) and app.call("GET", "/ready")[0] == 200)
    wait_until(lambda: ask(app, "a")[0] == 200)
    assert_answers(app, revisions, first)
    assert is_refused(app, 1)


def test_an_object_that_is_put_back_is_served_without_a_restart(
    deploy: Callable[..., App], revisions: Revisions
) -> None:
    first = revisions.manifests[0]
    objects = [
        revisions.out / object_key(str(first.adapters["c"].factors)),
        revisions.out / object_key(first.clusters["0"].cores),
    ]
    for path in objects:
        path.rename(path.with_suffix(".gone"))
    app = deploy(is_strict=False, **{"start.ready_share": 0})
    before = replicas(app)
    assert [ask(app, model)[0] for model in ("a", "c")] == [503, 503]
    for path in objects:
        path.with_suffix(".gone").rename(path)
    wait_until(lambda: app.call("GET", "/ready?all=1")[0] == 200)
    assert_answers(app, revisions, first)
    if ENGINE == "transformers":  # vLLM starts anew where there was nothing to make room by
        assert replicas(app) == before


def kill_replicas(app: App) -> None:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if f"ray::ServeReplica:{app.name}:group-0" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.by_hand
def test_a_pinned_revision_stays(deploy: Callable[..., App], revisions: Revisions) -> None:
    first = revisions.manifests[0]
    app = deploy(bundle=f"{revisions.out}/bundles/{first.bundle}", revision=0)
    revisions.add({"a": "country-fr"}, {})
    time.sleep(4 * INTERVAL_S)
    assert_answers(app, revisions, first)


# Adapter -> folder in the cluster, and alone; what all of them have is asked for.
STATES: list[tuple[dict[str, str], dict[str, str]]] = [
    ({"a": "roman", "b": "number-en"}, {"c": "past"}),
    ({"b": "number-en", "a": "country-fr"}, {"c": "past", "e": "past"}),
    ({"x": "roman", "a": "number-en", "b": "roman"}, {"c": "last-letter"}),
]
BROKEN: tuple[dict[str, str], dict[str, str]] = ({"a": "country-fr", "b": "country-fr"}, {"c": "past"})


def is_refused(app: App, number: int) -> bool:
    return f"refuses revision {number}" in app.call("GET", "/ready")[2]["map"]


def is_served(app: App, number: int) -> bool:
    return serving(app) == number


@pytest.mark.parametrize(
    ("moves", "clients", "routers"),
    [
        (6, 6, 1),
        pytest.param(20, 32, 2, marks=pytest.mark.by_hand),
    ],
)
def test_under_load_no_request_fails_and_none_is_answered_by_another_revision_than_it_names(
    deploy: Callable[..., App], revisions: Revisions, moves: int, clients: int, routers: int
) -> None:
    app = deploy(routers=routers)
    took = []
    with Load(app, revisions.expected, ("a", "b", "c"), clients) as load:
        for move in range(1, moves + 1):
            is_broken = move % 4 == 3
            number = revisions.add(*(BROKEN if is_broken else STATES[move % len(STATES)])).revision
            if is_broken:
                flip_a_byte(revisions.out / object_key(revisions.manifests[-1].clusters["0"].cores))
                wait_until(partial(is_refused, app, number))
            else:
                wait_until(partial(is_served, app, number))
                took.append(app.call("GET", "/ready")[2]["revision"]["converged_s"])
            wait_until(partial(load.has_answered, load.num_answers + 2 * clients))
    assert not load.failed, load.failed[:5]
    assert len(load.served) >= 5, "the load hardly saw the moves"
    print(f"{load.num_answers} answers over {moves} moves; converged within {max(took):.1f} s")
