"""The job under faults that are provoked for real: killed workers, killed jobs, stores that fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bundle import Bundle, read_current, read_manifest
from cluster.publish import missing_objects
from cluster.store import Store, open_store
from compress_jobs.__main__ import main
from tests.jobs import FEW, copy_adapters, object_bytes
from tests.s3_proxy import Action, S3Proxy, always
from tests.seaweed import S3Server

OPTIONS = ["--clusters", "2", "--rank", "16", "--num-cpus", "2"]


@contextlib.contextmanager
def job_process(*line: str) -> Iterator[subprocess.Popen[str]]:
    """``compress_jobs run`` in a process group of its own, which is gone at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "compress_jobs", "run", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def processes_named(name: str, session: int) -> list[int]:
    """Processes of the session whose title begins so (a Ray worker's title is the task it is running)."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith(name) and os.getsid(int(folder.name)) == session:
                found.append(int(folder.name))
    return found


def kill_the_first(name: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (found := processes_named(name, process.pid)):
        assert process.poll() is None, f"the job ended before any {name} was seen"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(found[0], signal.SIGKILL)


def assert_all_visible_revisions_are_whole(store: Store) -> None:
    """CURRENT, where there is one, and every manifest, whether it is current or not."""
    current = read_current(store)
    if current is not None:
        assert not missing_objects(store, read_manifest(store, current[0].bundle, current[0].revision))
    for entry in store.list("bundles/"):
        if entry.key.endswith("/manifest.json"):
            _, bundle, _, revision, _ = entry.key.split("/")
            opened = Bundle(store, read_manifest(store, bundle, int(revision)))
            for home in opened.serving_map.homes():
                opened.load_home(home)


def run_job_process(*line: str) -> None:
    with job_process(*line) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed


@pytest.fixture(scope="module")
def undisturbed(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job that nothing happens to publishes of all shipped adapters."""
    out = tmp_path_factory.mktemp("undisturbed")
    run_job_process("--adapters", str(zoo_path), "--base", str(base_path), "--out", str(out), *OPTIONS)
    return out


@pytest.fixture(scope="module")
def published(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An earlier, smaller bundle."""
    root = tmp_path_factory.mktemp("published")
    few = copy_adapters(zoo_path, root / "few", FEW[:2])
    run_job_process("--adapters", str(few), "--base", str(base_path), "--out", str(root / "out"), *OPTIONS)
    return root / "out"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ray::inspect_adapter", "ray::fit_layer"])
def test_a_worker_killed_during_the_job_changes_nothing_of_what_is_published(
    base_path: Path, zoo_path: Path, tmp_path: Path, undisturbed: Path, task: str
) -> None:
    inputs = ["--adapters", str(zoo_path), "--base", str(base_path), "--out", str(tmp_path / "killed")]
    with job_process(*inputs, *OPTIONS) as process:
        kill_the_first(task, process)
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert object_bytes(tmp_path / "killed") == object_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["inspect: 12/12", "cluster:", "fit layers: 30/30", "assemble:"])
def test_a_job_killed_at_any_stage_leaves_what_was_published_and_nothing_partial(
    base_path: Path, zoo_path: Path, tmp_path: Path, published: Path, undisturbed: Path, stage: str
) -> None:
    out = shutil.copytree(published, tmp_path / "out")
    inputs = ["--adapters", str(zoo_path), "--base", str(base_path), "--out", str(out), *OPTIONS]
    before = (out / "CURRENT").read_bytes()
    with job_process(*inputs) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(stage):
                os.killpg(process.pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"no line {stage!r}")
    store = open_store(str(out))
    assert_all_visible_revisions_are_whole(store)
    # Killed after its last stage line, the job may just have made it.
    if stage != "assemble:":
        assert (out / "CURRENT").read_bytes() == before
    run_job_process(*inputs)
    assert_all_visible_revisions_are_whole(store)
    assert Bundle.open(str(out)).manifest.with_own_id() == Bundle.open(str(undisturbed)).manifest.with_own_id()


@pytest.mark.slow
def test_a_job_whose_store_throttles_and_cuts_now_and_then_publishes_the_same_objects(
    s3_server: S3Server,
    s3_bucket: str,
    base_path: Path,
    zoo_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few = copy_adapters(zoo_path, tmp_path / "few")
    inputs = ["--adapters", str(few), "--base", str(base_path), *OPTIONS]
    run_job_process(*inputs, "--out", str(tmp_path / "calm"))
    count = [0]

    def now_and_then(method: str, path: str, headers: object) -> Action:
        count[0] += 1
        faults = {
            3: Action.SLOW_DOWN,
            9: Action.DROP,
            15: Action.TRUNCATE if method == "GET" else Action.FORWARD_THEN_DROP,
        }
        return faults.get(count[0] % 20, Action.FORWARD)

    with S3Proxy(s3_server, now_and_then) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run_job_process(*inputs, "--out", f"{s3_bucket}/out")
    assert count[0] > 100
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    store = open_store(f"{s3_bucket}/out")
    assert_all_visible_revisions_are_whole(store)
    stored = {entry.key.removeprefix("objects/"): store.read(entry.key).data for entry in store.list("objects/")}
    assert stored == object_bytes(tmp_path / "calm")
    assert not list(store.list("work/"))


def test_a_store_that_ignores_conditional_writes_is_named_before_anything_is_read(
    s3_server: S3Server,
    s3_bucket: str,
    base_path: Path,
    zoo_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with S3Proxy(s3_server, always(Action.STRIP_CONDITIONS)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        status = main(["run", "--adapters", str(zoo_path), "--base", str(base_path), "--out", f"{s3_bucket}/out"])
    assert status == 1
    assert "conditional" in capsys.readouterr().err
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
    assert not list(open_store(f"{s3_bucket}/out").list())


@pytest.mark.parametrize("fault", ["secret", "bucket", "endpoint"])
@pytest.mark.parametrize("option", ["--adapters", "--out"])
def test_a_store_that_cannot_be_used_ends_the_job_with_its_own_message(
    s3_bucket: str,
    base_path: Path,
    zoo_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    option: str,
) -> None:
    places = {"--adapters": str(zoo_path), "--base": str(base_path), "--out": str(tmp_path / "out")}
    places[option] = f"{s3_bucket}/somewhere"
    if fault == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    elif fault == "bucket":
        places[option] = "s3://no-such-bucket/somewhere"
    else:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    status = main(["run", *(word for pair in places.items() for word in pair)])
    expected = {"secret": "AWS_SECRET_ACCESS_KEY", "bucket": "no-such-bucket", "endpoint": "127.0.0.1:9"}[fault]
    printed = capsys.readouterr().err
    assert status == 1
    assert expected in printed
    assert "not-the-secret" not in printed
    assert "Traceback" not in printed
