"""Killed for real, and started again: drivers, nodes, twins. (The fast ones are in test_job.py.)"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cluster.bundle.reading import Bundle
from cluster.store.address import open_store
from cluster.store.protocol import Store
from infra.seaweed import S3Server
from tests.support.jobs import FEW, copy_adapters, object_bytes
from tests.support.processes import (
    assert_all_visible_revisions_are_whole,
    ended_well,
    job_process,
    kill_session,
    run_job_process,
)
from tests.support.s3_proxy import Action, S3Proxy

pytestmark = pytest.mark.slow

NAMES = FEW[:4]
OPTIONS = ["--clusters", "2", "--rank", "16", "--gate", "0.05", "--num-cpus", "2"]  # some truncated, some not
NUM_LAYERS = 30


@pytest.fixture(scope="module")
def adapters(zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_adapters(zoo_path, tmp_path_factory.mktemp("collection") / "adapters", NAMES)


@pytest.fixture(scope="module")
def undisturbed(base_path: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run_job_process("--adapters", str(adapters), "--base", str(base_path), "--out", str(out), *OPTIONS)
    return out


def stored(store: Store, prefix: str) -> dict[str, str]:
    return {entry.key: entry.etag for entry in store.list(prefix)}


def assert_published_as(undisturbed: Path, store: Store) -> None:
    objects = {entry.key.removeprefix("objects/"): store.read(entry.key).data for entry in store.list("objects/")}
    assert objects == object_bytes(undisturbed)
    assert Bundle.open(store.uri).manifest.with_own_id().bundle == Bundle.open(str(undisturbed)).manifest.bundle
    assert_all_visible_revisions_are_whole(store)
    assert stored(store, "work/") == {}


class Freezer:
    """Holds the store still at the ``count``-th request that ``where`` matches ("PUT /bucket/key"); notes all reads
    of adapters. ``action`` is what becomes of that request when whoever sent it is dead."""

    def __init__(self, where: str, count: int, action: Action) -> None:
        self.where, self.left, self.action = re.compile(where), count, action
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.whole_reads: list[str] = []
        self.ranged_reads: list[str] = []
        self.written: list[str] = []

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> Action:
        path = path.partition("?")[0]
        if method == "GET" and path.endswith("adapter_model.safetensors"):
            (self.ranged_reads if "range" in headers else self.whole_reads).append(path.split("/")[-2])
        if method == "PUT":
            self.written.append(path.partition("/out/")[2])
        if self.left and self.where.search(f"{method} {path}"):
            self.left -= 1
            if not self.left:
                self.reached.set()
                assert self.go_on.wait(600)
                return self.action
        return Action.FORWARD


KILLS = [
    (r"PUT .*/inspected/", 3, Action.DROP),
    (r"PUT .*/clustered\.json", 1, Action.FORWARD),
    (r"PUT .*/fits/[^/]+/0-1/\d+\.json", 7, Action.DROP),
    (r"PUT .*/fits/[^/]+/\d+-\d+\.safetensors", 11, Action.FORWARD),
    (r"PUT .*/objects/", 2, Action.FORWARD),
    (r"PUT .*/manifest\.json", 1, Action.FORWARD),
    (r"PUT .*/CURRENT", 1, Action.DROP),
    (r"PUT .*/CURRENT", 1, Action.FORWARD),
]
"""One after the other to the same job; at last it had published, and its answer was lost with it."""


@pytest.mark.by_hand
def test_a_job_killed_eight_times_goes_on_each_time_and_does_nothing_twice(
    s3_server: S3Server, s3_bucket: str, base_path: Path, adapters: Path, undisturbed: Path
) -> None:
    source, out = open_store(f"{s3_bucket}/adapters"), open_store(f"{s3_bucket}/out")
    for path in adapters.rglob("*.*"):
        source.write(path.relative_to(adapters).as_posix(), path.read_bytes())
    inputs = ["--adapters", source.uri, "--base", str(base_path), "--out", out.uri, *OPTIONS]
    parts: dict[str, str] = {}
    num_whole = num_ranged = 0

    def check(freezer: Freezer) -> None:
        """Nothing that was there has been written again, nor the sources read for it."""
        nonlocal parts, num_whole, num_ranged
        fitted = {
            match[1] + match[2] for key in parts if (match := re.fullmatch(r"(.*/fits/[^/]+/)0-1/(\d+)\.json", key))
        }
        done = {key for key in parts if key.endswith(".json") or key.rpartition("-")[0] in fitted}
        assert not done & set(freezer.written)
        num_inspected = sum("/inspected/" in key for key in parts)
        num_alone = sum("/alone/" in key for key in parts)
        assert len(freezer.whole_reads) <= len(NAMES) - num_inspected
        assert len(freezer.ranged_reads) <= len(NAMES) * (NUM_LAYERS - len(fitted) + 1) - num_alone
        num_whole, num_ranged = num_whole + len(freezer.whole_reads), num_ranged + len(freezer.ranged_reads)
        assert_all_visible_revisions_are_whole(out)

    for where, count, action in KILLS:
        freezer = Freezer(where, count, action)
        with (
            S3Proxy(s3_server, freezer) as proxy,
            job_process(*inputs, AWS_ENDPOINT_URL=proxy.endpoint) as process,
        ):
            while not freezer.reached.wait(0.05):
                assert process.poll() is None, process.communicate()
            kill_session(process)
            freezer.go_on.set()
            time.sleep(0.5)  # what else was under way arrives at the store
        check(freezer)
        now = stored(out, "work/")
        assert parts.items() <= now.items()
        assert len(now) > len(parts) or "objects" in where or "manifest" in where or "CURRENT" in where
        parts = now
        assert bool(stored(out, "CURRENT")) == (action is Action.FORWARD and "CURRENT" in where)
    freezer = Freezer("never", 1, Action.FORWARD)
    with S3Proxy(s3_server, freezer) as proxy:
        assert "unchanged" in run_job_process(*inputs, AWS_ENDPOINT_URL=proxy.endpoint)
    check(freezer)
    # Nine runs together: what was under way at a kill is read once more, and no more than that.
    assert num_whole <= len(NAMES) + 2
    assert num_ranged <= len(NAMES) * (NUM_LAYERS + 2 * 4 * 2)
    assert_published_as(undisturbed, out)


@pytest.mark.by_hand
def test_of_twins_that_start_together_both_end_well(
    base_path: Path, adapters: Path, undisturbed: Path, tmp_path: Path
) -> None:
    inputs = ["--adapters", str(adapters), "--base", str(base_path), "--out", str(tmp_path / "out"), *OPTIONS]
    with job_process(*inputs) as first, job_process(*inputs) as second:
        printed = [ended_well(first), ended_well(second)]
    assert all("published at" in text or "unchanged:" in text for text in printed)
    assert_published_as(undisturbed, open_store(str(tmp_path / "out")))


@pytest.mark.parametrize(
    "where", [pytest.param(r"PUT .*/fits/[^/]+/0-1/\d+\.json", marks=pytest.mark.by_hand), r"PUT .*/assembled/"]
)
def test_a_twin_that_is_overtaken_says_that_it_is_published_and_leaves_nothing(
    s3_server: S3Server, s3_bucket: str, base_path: Path, adapters: Path, undisturbed: Path, where: str
) -> None:
    out = open_store(f"{s3_bucket}/out")
    inputs = ["--adapters", str(adapters), "--base", str(base_path), "--out", out.uri, *OPTIONS]
    freezer = Freezer(where, 1, Action.FORWARD)
    with S3Proxy(s3_server, freezer) as proxy, job_process(*inputs, AWS_ENDPOINT_URL=proxy.endpoint) as slow:
        while not freezer.reached.wait(0.05):
            assert slow.poll() is None, slow.communicate()
        run_job_process(*inputs)  # past the proxy
        freezer.go_on.set()
        printed = ended_well(slow)
    assert "unchanged:" in printed or "published at" in printed
    assert_published_as(undisturbed, out)


# --- Several nodes ------------------------------------------------------------------------------------------


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Cluster, list[Any]]]:
    """A Ray cluster of a head without CPUs and two nodes with one each."""
    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    try:
        workers = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster, workers
    finally:
        cluster.shutdown()


def fitting_on(node: Any) -> bool:
    """Whether a worker of that node is in a fit task at this moment."""
    raylet = node.all_processes["raylet"][0].process.pid
    children = [pid for path in Path(f"/proc/{raylet}/task").glob("*/children") for pid in path.read_text().split()]
    return any(_title(pid).startswith("ray::fit_layer") for pid in children)


def _title(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@pytest.mark.by_hand
def test_a_node_killed_while_both_fit_changes_nothing_of_what_is_published(
    nodes: tuple[Cluster, list[Any]], base_path: Path, adapters: Path, undisturbed: Path, tmp_path: Path
) -> None:
    cluster, workers = nodes
    inputs = ["--adapters", str(adapters), "--base", str(base_path), "--out", str(tmp_path / "out"), *OPTIONS]
    with job_process(*inputs) as process:
        seen = [False, False]
        while not all(seen) or not fitting_on(workers[1]):
            assert process.poll() is None, process.communicate()
            seen = [before or fitting_on(node) for before, node in zip(seen, workers, strict=True)]
            time.sleep(0.002)
        cluster.remove_node(workers[1], allow_graceful=False)
        ended_well(process)
    assert_published_as(undisturbed, open_store(str(tmp_path / "out")))


@pytest.mark.by_hand
def test_a_driver_killed_on_a_cluster_that_lives_on_is_replaced_by_another(
    nodes: tuple[Cluster, list[Any]], base_path: Path, adapters: Path, undisturbed: Path, tmp_path: Path
) -> None:
    _, workers = nodes
    inputs = ["--adapters", str(adapters), "--base", str(base_path), "--out", str(tmp_path / "out"), *OPTIONS]
    with job_process(*inputs) as process:
        while not any(map(fitting_on, workers)):
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        process.kill()
    assert "going on with job" in run_job_process(*inputs)
    assert_published_as(undisturbed, open_store(str(tmp_path / "out")))
