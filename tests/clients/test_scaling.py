"""Groups that scale, over a real Serve: to zero and back, up under load, within a number of devices."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from cluster.bundle.manifest import Manifest
from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import write_bundle
from tests.support.load import NUM_TOKENS, PROMPT, Load, ask
from tests.support.serving import ENGINE, PATIENCE_S, Peft, ray_with_serve

pytestmark = pytest.mark.slow

CLUSTERS = {"0": {"roman": "roman", "number-en": "number-en"}, "1": {"past": "past", "country-fr": "country-fr"}}
NAMES = tuple(name for adapters in CLUSTERS.values() for name in adapters)
# The means that decide are of the last 30 seconds, told every 10.
TO_ZERO_S, DELAY_S = 120.0, 20
Expected = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("scaling") / "out"
    clusters = {cluster: {name: zoo_path / name for name in adapters} for cluster, adapters in CLUSTERS.items()}
    return out, write_bundle(out, base_path, clusters, {})


@pytest.fixture(scope="module")
def expected(bundle: tuple[Path, Manifest], base_path: Path, zoo_path: Path) -> Expected:
    oracle, (_, manifest) = Peft(base_path), bundle
    return {
        (name, manifest.adapters[name].served): oracle.answer(zoo_path / name, PROMPT, NUM_TOKENS) for name in NAMES
    }


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ray_with_serve() as port:
        yield port


@pytest.fixture
def arguments(bundle: tuple[Path, Manifest], base_path: Path) -> dict[str, Any]:
    return {
        "bundle": str(bundle[0]),
        "base": str(base_path),
        "engine": ENGINE,
        "limits": {"max_batch": 8, "max_model_len": 512},
        "placement": {"clusters_per_group": 2, "devices": 2},
        "autoscaling": {"min": 0, "max": 2, "upscale_delay_s": 0, "downscale_delay_s": DELAY_S},
    }


@pytest.fixture
def deploy(port: int, arguments: dict[str, Any]) -> Iterator[Callable[..., App]]:
    with ExitStack() as stack:

        def deploy(**scaling: Any) -> App:
            given = arguments | {"autoscaling": arguments["autoscaling"] | scaling}
            serve.run(build(given), name="scaling", route_prefix="/scaling")
            stack.callback(serve.delete, "scaling")
            app = App(port, "scaling", "/scaling")
            wait_until(lambda: app.call("GET", "/ready?all=1")[0] == 200)
            return app

        yield deploy


def replicas(group: str = "group-") -> set[int]:
    """Process ids of what there is of it, in this test's Ray alone."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ray::ServeReplica:scaling:{group}" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def stays(condition: Callable[[], bool], for_s: float) -> bool:
    end = time.monotonic() + for_s
    while time.monotonic() < end:
        if not condition():
            return False
        time.sleep(0.5)
    return True


def answers_rightly(app: App, expected: Expected, name: str, stream: bool = False) -> bool:
    status, served, text = ask(app, name, stream)
    assert status == 200, text
    return expected[name, served] == text


def test_nothing_but_a_request_wakes_a_group_at_zero_and_the_answer_is_pefts(
    deploy: Callable[..., App], expected: Expected
) -> None:
    app = deploy()

    def asleep() -> bool:
        """Asked all the time, and whatever does not need a replica with it."""
        status, _, said = app.call("GET", "/ready?all=1")
        assert app.call("GET", "/v1/models")[0] == 200
        assert ask(app, "nobody")[0] == 404
        told = set(said["homes"].values()) == {"group-0: at zero; a request wakes it"}
        return status == 200 and told and not replicas()

    assert stays(asleep, 20)
    assert answers_rightly(app, expected, "roman", stream=True)
    assert answers_rightly(app, expected, "past", stream=True)
    group = app.group("group-0")
    assert len(replicas()) == len(group["replicas"]) == 1
    assert 0 < group["cold_start_s"] < PATIENCE_S
    wait_until(asleep, TO_ZERO_S)
    assert stays(asleep, 15), "what was sent before woke it again"
    assert answers_rightly(app, expected, "number-en")


@pytest.mark.by_hand
def test_where_requests_do_not_wait_one_is_told_when_to_come_back_and_wakes_the_group(
    deploy: Callable[..., App], expected: Expected
) -> None:
    app = deploy(at_zero="refuse")
    body = json.dumps({"model": "roman", "prompt": PROMPT, "stream": True}).encode()
    status, headers, said = app.call("POST", "/v1/completions", body)
    assert (status, said["error"]["code"]) == (503, "service_unavailable")
    assert int(headers["retry-after"]) > 1
    assert "is being woken; try again in" in said["error"]["message"]
    wait_until(lambda: app.group("group-0")["alive"])
    assert answers_rightly(app, expected, "roman")


@pytest.mark.by_hand
def test_under_load_a_group_grows_and_shrinks_again_and_no_request_fails(
    deploy: Callable[..., App], expected: Expected
) -> None:
    app = deploy(min=1, target_ongoing=6)
    assert len(replicas()) == 1
    with Load(app, expected, NAMES, 8) as load:
        wait_until(lambda: len(app.group("group-0")["replicas"]) == 2)
        before = load.num_answers
        wait_until(lambda: load.num_answers > before + 20)
    assert not load.failed, load.failed[:5]

    def streams() -> list[str]:
        """One after the other; how each ended."""
        ends = []
        while len(app.group("group-0")["replicas"]) == 2:
            ends.append(end_of_a_long_stream(app))
        return ends

    # There are streams on both when one is given up: that one ends them first.
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(streams) for _ in range(2)]
        wait_until(lambda: len(replicas()) == 1, TO_ZERO_S)
        ends = [end for own in running for end in own.result()]
    assert len(ends) >= 2
    assert set(ends) == {"data: [DONE]"}


def end_of_a_long_stream(app: App) -> str:
    fields = {"model": "roman", "prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with app.open("POST", "/v1/completions", body=json.dumps(fields).encode()) as answer:
        return answer.read().decode().strip().splitlines()[-1]


def deploy_config(arguments: dict[str, Any], app: App, **application: Any) -> None:
    """As ``serve deploy`` does, and waits until it runs."""
    own = {
        "name": "scaling",
        "route_prefix": "/scaling",
        "import_path": "serve_app.app:build",
        "runtime_env": {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
        "args": arguments,
    }
    client = _get_global_client()
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": [own | application]}))
    wait_until(lambda: serve.status().applications["scaling"].status == "RUNNING")
    wait_until(lambda: app.call("GET", "/ready?all=1")[0] == 200)


@pytest.fixture
def app(port: int) -> Iterator[App]:
    yield App(port, "scaling", "/scaling")
    serve.delete("scaling")


def targets() -> dict[str, int]:
    """Replicas that Serve means each group to have."""
    details = ray.get(_get_global_client()._controller.get_serve_instance_details.remote())
    deployments = details["applications"]["scaling"]["deployments"]
    return {name: own["target_num_replicas"] for name, own in deployments.items() if name.startswith("group-")}


@pytest.mark.by_hand
def test_two_groups_share_one_device_and_each_is_answered(
    arguments: dict[str, Any], app: App, expected: Expected
) -> None:
    arguments["placement"] = {"clusters_per_group": 1, "devices": 1}
    arguments["autoscaling"] |= {"share_devices": True}
    policy = {"policy_function": "serve_app.autoscaling:ShareDevices", "policy_kwargs": {"devices": 1}}
    deploy_config(arguments, app, autoscaling_policy=policy)
    assert targets() == {"group-0": 0, "group-1": 0}
    for name in ("roman", "past", "number-en"):
        # The device is another's until that has had nothing to do for the delay.
        assert answers_rightly(app, expected, name)
        assert sum(targets().values()) == 1


@pytest.mark.by_hand
def test_numbers_of_a_deployment_change_without_a_restart(
    arguments: dict[str, Any], app: App, expected: Expected
) -> None:
    def numbers(least: int, most: int, target: float) -> list[dict[str, Any]]:
        scaling = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}
        policy = {"policy_function": "serve_app.autoscaling:by_sequences"}
        return [{"name": "group-0", "autoscaling_config": scaling | {"policy": policy}}]

    deploy_config(arguments, app, deployments=numbers(1, 1, 4))
    wait_until(lambda: app.group("group-0")["alive"])
    before = replicas()
    deploy_config(arguments, app, deployments=numbers(1, 2, 8))
    deploy_config(arguments, app, deployments=numbers(2, 2, 8))
    wait_until(lambda: len(app.group("group-0")["replicas"]) == 2)
    assert before < replicas(), "the first one was replaced"
    assert answers_rightly(app, expected, "roman")
