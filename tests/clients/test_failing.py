"""What breaks under load, and what clients see of it: real processes, killed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from cluster.bundle.manifest import Manifest
from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import write_bundle
from tests.support.load import NUM_TOKENS, PROMPT, Load, ask
from tests.support.serving import ENGINE, Peft, ray_with_serve

pytestmark = pytest.mark.slow

CLUSTER, RAW = {"roman": "roman", "number-en": "number-en"}, {"past": "past"}
CLIENTS = 8
Expected = dict[tuple[str, str], str]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("failing") / "out"
    clusters = {"0": {name: zoo_path / folder for name, folder in CLUSTER.items()}}
    return out, write_bundle(out, base_path, clusters, {name: zoo_path / folder for name, folder in RAW.items()})


@pytest.fixture(scope="module")
def expected(bundle: tuple[Path, Manifest], base_path: Path, zoo_path: Path) -> Expected:
    oracle, (_, manifest) = Peft(base_path), bundle
    return {
        (name, manifest.adapters[name].served): oracle.answer(zoo_path / folder, PROMPT, NUM_TOKENS)
        for name, folder in (CLUSTER | RAW).items()
    }


@pytest.fixture
def deploy(bundle: tuple[Path, Manifest], base_path: Path) -> Iterator[Callable[..., App]]:
    with ExitStack() as stack:

        def deploy(replicas: int = 1, **more: Any) -> App:
            port = stack.enter_context(ray_with_serve())
            args: dict[str, Any] = {"bundle": str(bundle[0]), "base": str(base_path), "engine": ENGINE}
            args |= {"limits.max_batch": CLIENTS, "limits.max_model_len": 512, "placement.devices": replicas}
            serve.run(build(args | {"placement.replicas": replicas} | more), name="failing")
            app = App(port, "failing")
            wait_until(lambda: app.call("GET", "/ready?all=1")[0] == 200 and len(living(app)) == replicas)
            return app

        yield deploy


def living(app: App) -> list[str]:
    replicas = app.call("GET", "/ready")[2]["groups"]["group-0"]["replicas"]
    return [name for name, own in replicas.items() if own["alive"]]


def processes(title: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def has_more_than(load: Load, number: int) -> bool:
    return load.num_answers > number


def test_of_two_replicas_one_is_killed_and_only_streams_that_it_had_begun_are_cut(
    deploy: Callable[..., App], expected: Expected
) -> None:
    app = deploy(replicas=2)
    with Load(app, expected, tuple(CLUSTER | RAW), CLIENTS) as load:
        for _ in range(2):
            wait_until(lambda: len(living(app)) == 2)
            wait_until(partial(has_more_than, load, load.num_answers + 3 * CLIENTS))
            first = processes("ray::ServeReplica:failing:group-0")[0]
            os.kill(first.pid, signal.SIGKILL)
            wait_until(partial(has_more_than, load, load.num_answers + 3 * CLIENTS))
    assert not load.failed, load.failed[:5]
    assert len(load.cut) <= 2 * CLIENTS


@pytest.mark.by_hand
def test_of_two_replicas_one_that_hangs_is_replaced_and_the_other_goes_on(
    deploy: Callable[..., App], expected: Expected
) -> None:
    app = deploy(replicas=2)
    before = set(living(app))
    stopped = processes("ray::ServeReplica:failing:group-0")[0]
    with Load(app, expected, tuple(CLUSTER | RAW), CLIENTS) as load:
        wait_until(partial(has_more_than, load, 3 * CLIENTS))
        os.kill(stopped.pid, signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda: not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE)
        took = time.monotonic() - began
        wait_until(lambda: len(living(app)) == 2)
        wait_until(partial(has_more_than, load, load.num_answers + 3 * CLIENTS))
    print(f"replaced after {took:.0f} s; {len(load.cut)} cut, {len(load.failed)} failed of {load.num_answers}")
    assert set(living(app)) != before
    assert not load.failed, load.failed[:5]
    assert len(load.cut) <= CLIENTS


@pytest.mark.by_hand
@pytest.mark.parametrize(("what", "number"), [("router", 1), ("router", 2), ("group-0", 2)])
def test_a_process_whose_event_loop_hangs_ends_itself_and_takes_no_more_along_than_it_was_asked_for(
    deploy: Callable[..., App], expected: Expected, what: str, number: int
) -> None:
    app = deploy(**{"routers": number} if what == "router" else {"replicas": number})
    title = f"ray::ServeReplica:failing:{what}"
    wait_until(lambda: len(processes(title)) == number)
    before = {process.pid for process in processes(title)}
    with Load(app, expected, tuple(CLUSTER | RAW), CLIENTS) as load:
        wait_until(partial(has_more_than, load, 3 * CLIENTS))
        hang(what)
        began = time.monotonic()
        wait_until(lambda: not before <= {process.pid for process in processes(title)})
        took = time.monotonic() - began
        wait_until(lambda: len(processes(title)) == number)
        wait_until(partial(has_more_than, load, load.num_answers + 3 * CLIENTS))
    print(f"gone after {took:.0f} s; {len(load.cut)} cut, {len(load.failed)} failed of {load.num_answers}")
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    assert any("the event loop hangs" in log.read_text() for log in logs.glob(f"replica_failing_{what}_*.log"))
    assert len(load.failed) + len(load.cut) <= CLIENTS, load.failed[:5]


def hang(deployment: str) -> None:
    """One of its processes, in its event loop: the call itself comes by another thread."""

    def stop(actor: Any) -> None:
        loop = actor._replica_impl._user_callable_wrapper._user_code_event_loop
        loop.call_soon_threadsafe(time.sleep, 600)

    actors = [own["name"] for own in ray.util.list_named_actors(all_namespaces=True)]
    name = next(name for name in actors if f"failing#{deployment}#" in name)
    ray.get_actor(name, namespace=SERVE_NAMESPACE).__ray_call__.remote(stop)


@pytest.mark.by_hand
def test_a_killed_controller_is_back_and_no_request_notices(deploy: Callable[..., App], expected: Expected) -> None:
    app = deploy()
    before = living(app)
    with Load(app, expected, tuple(CLUSTER | RAW), CLIENTS) as load:
        wait_until(partial(has_more_than, load, 3 * CLIENTS))
        for _ in range(2):
            ray.kill(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE), no_restart=False)
            wait_until(partial(has_more_than, load, load.num_answers + 6 * CLIENTS))
            wait_until(lambda: serve.status().applications["failing"].status == "RUNNING")
    assert not load.failed, load.failed[:5]
    assert not load.cut
    assert living(app) == before


@pytest.mark.by_hand
def test_3000_requests_leave_memory_as_it_was(deploy: Callable[..., App]) -> None:
    """Whole and streamed ones, refused ones, and streams whose clients leave."""
    app = deploy(**{"limits.max_batch": 32})
    own = {process.pid: process for process in processes("ray::ServeReplica:failing:")}
    assert len(own) == 2, "the router and the replica"

    def ask_one(number: int) -> None:
        fields: dict[str, Any] = {"model": "roman", "prompt": f"{number}", "max_tokens": 2, "ignore_eos": True}
        match number % 4:
            case 0:
                assert ask_for(fields) == 200
            case 1:
                assert ask_for(fields | {"stream": True}) == 200
            case 2:
                assert ask_for(fields | {"model": f"nobody-{number}"}) == 404
            case 3:
                with contextlib.closing(app.send(fields | {"stream": True, "max_tokens": 400})) as stream:
                    assert stream.recv(12) == b"HTTP/1.1 200"

    def ask_for(fields: dict[str, Any]) -> int:
        with app.open("POST", "/v1/completions", body=json.dumps(fields).encode()) as answer:
            answer.read()
            return answer.status

    sizes = []
    with ThreadPoolExecutor(16) as pool:
        for asked in (range(1000), range(1000, 4000)):
            list(pool.map(ask_one, asked))
            wait_until(lambda: app.group("group-0")["num_inflight"] == 0)
            sizes.append({process.cmdline()[0]: process.memory_full_info().uss >> 10 for process in own.values()})
    grown = {name: sizes[1][name] - size for name, size in sizes[0].items()}
    print(f"KiB before {sizes[0]}, grown by {grown}")
    assert max(grown.values()) < 3000 * 6, grown


@pytest.mark.skipif(ENGINE != "vllm", reason="that engine's own process")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_whose_process_ends_or_hangs_is_seen_and_its_replica_replaced(
    deploy: Callable[..., App], expected: Expected, how: signal.Signals
) -> None:
    app = deploy(replicas=1)
    (before,) = living(app)
    (engine,) = processes("VLLM::EngineCore")
    os.kill(engine.pid, how)
    began = time.monotonic()
    wait_until(lambda: app.call("GET", "/ready")[0] == 503)
    told = app.call("GET", "/ready")[2]
    assert told["homes"]["cluster:0"].startswith("group-0: ")
    if how == signal.SIGKILL:
        assert time.monotonic() - began < 5, "it was told as ready while every answer was a 503"
        assert ask(app, "roman")[0] == 503
    deadline = time.monotonic() + 240
    while app.call("GET", "/ready?all=1")[0] != 200:
        assert time.monotonic() < deadline, told
        time.sleep(0.5)
    print(f"{how.name}: served again after {time.monotonic() - began:.0f} s")
    assert living(app) != [before]
    status, served, text = ask(app, "roman")
    assert (status, text) == (200, expected["roman", served])
