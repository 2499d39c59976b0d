"""The job under faults that are provoked for real: killed workers, killed jobs, stores that fail."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.bundle.reading import Bundle
from cluster.store.address import open_store
from compress_jobs.__main__ import main
from infra.seaweed import S3Server
from tests.support.jobs import FEW, copy_adapters, object_bytes
from tests.support.processes import (
    assert_all_visible_revisions_are_whole,
    ended_well,
    job_process,
    kill_session,
    kill_the_first,
    run_job_process,
)
from tests.support.s3_proxy import Action, S3Proxy, always

OPTIONS = ["--clusters", "2", "--rank", "16", "--num-cpus", "2"]


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
        ended_well(process)
    assert object_bytes(tmp_path / "killed") == object_bytes(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param("inspect: 12/12", marks=pytest.mark.by_hand), "assemble: "])
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
                kill_session(process)
                break
        else:
            pytest.fail(f"no line {stage!r}")
    store = open_store(str(out))
    assert_all_visible_revisions_are_whole(store)
    assert (out / "CURRENT").read_bytes() == before
    run_job_process(*inputs)
    assert_all_visible_revisions_are_whole(store)
    assert Bundle.open(str(out)).manifest.with_own_id() == Bundle.open(str(undisturbed)).manifest.with_own_id()


Decide = Callable[[str, float], Action]
"""(method, a number between 0 and 1) -> what happens to the request."""

BAD_STORES: dict[str, Decide] = {
    "503": lambda method, luck: Action.SLOW_DOWN if luck < 0.1 else Action.FORWARD,
    "cut": lambda method, luck: (
        (Action.TRUNCATE if method == "GET" else Action.FORWARD_THEN_DROP) if luck < 0.1 else Action.FORWARD
    ),
    "slow": lambda method, luck: Action.DROP if luck < 0.05 else Action.SLOW,
}


@pytest.fixture(scope="module")
def calm(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few adapters, and in ``out`` what a job that nothing happens to publishes of them."""
    root = tmp_path_factory.mktemp("calm")
    few = copy_adapters(zoo_path, root / "adapters", FEW[:4])
    run_job_process("--adapters", str(few), "--base", str(base_path), "--out", str(root / "out"), *OPTIONS)
    return root


@pytest.fixture
def inputs(s3_bucket: str, base_path: Path, calm: Path) -> list[str]:
    """The same adapters on S3."""
    for path in (calm / "adapters").rglob("*.*"):
        open_store(f"{s3_bucket}/adapters").write(path.relative_to(calm / "adapters").as_posix(), path.read_bytes())
    return ["--adapters", f"{s3_bucket}/adapters", "--base", str(base_path), *OPTIONS]


def assert_published_as(calm: Path, uri: str) -> None:
    store = open_store(uri)
    assert_all_visible_revisions_are_whole(store)
    stored = {entry.key.removeprefix("objects/"): store.read(entry.key).data for entry in store.list("objects/")}
    assert stored == object_bytes(calm / "out")
    assert Bundle.open(uri).manifest.bundle == Bundle.open(str(calm / "out")).manifest.bundle
    assert not list(store.list("work/"))


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_store_that_fails_each_tenth_request_cuts_bodies_or_is_slow_loses_nothing(
    s3_server: S3Server, s3_bucket: str, calm: Path, inputs: list[str]
) -> None:
    with S3Proxy(s3_server) as proxy:
        run_job_process(*inputs, "--out", f"{s3_bucket}/calm", AWS_ENDPOINT_URL=proxy.endpoint)
    num_needed = len(proxy.seen)
    for name, decide in BAD_STORES.items():
        dice, out = random.Random(name), f"{s3_bucket}/{name}"
        with S3Proxy(s3_server, lambda method, path, headers: decide(method, dice.random())) as proxy:  # noqa: B023
            run_job_process(*inputs, "--out", out, AWS_ENDPOINT_URL=proxy.endpoint)
        faults = sum(action not in (Action.FORWARD, Action.SLOW) for _, _, action in proxy.seen)
        assert faults > 15, name
        # Each fault is made up for by one request more (two where a lost answer is read back).
        assert len(proxy.seen) <= num_needed + 2 * faults + 10, name
        assert_published_as(calm, out)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--adapters", "--out"])
def test_a_store_that_always_fails_is_given_up_after_a_dozen_requests_with_its_message(
    s3_server: S3Server,
    s3_bucket: str,
    base_path: Path,
    zoo_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
) -> None:
    """A dozen: four rounds of botocore's three, which take 16 s when every pause is the longest."""
    places = {"--adapters": str(zoo_path), "--base": str(base_path), "--out": str(tmp_path / "out")}
    places[option] = f"{s3_bucket}/somewhere"
    with S3Proxy(s3_server, always(Action.SLOW_DOWN)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert main(["run", *(word for pair in places.items() for word in pair)]) == 1
    assert len(proxy.seen) == 12
    printed = capsys.readouterr().err
    assert "503 SlowDown" in printed
    assert "wait, use fewer tasks at once" in printed
    assert "Traceback" not in printed


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_store_that_fails_for_good_during_the_job_ends_it_and_the_next_run_goes_on(
    s3_server: S3Server, s3_bucket: str, calm: Path, inputs: list[str]
) -> None:
    out = f"{s3_bucket}/out"
    line = [*inputs, "--out", out]
    fits = 0

    def until_some_are_fitted(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal fits
        fits += method == "PUT" and "/fits/" in path and path.endswith(".json")
        return Action.SLOW_DOWN if fits > 8 else Action.FORWARD

    with (
        S3Proxy(s3_server, until_some_are_fitted) as proxy,
        job_process(*line, AWS_ENDPOINT_URL=proxy.endpoint) as process,
    ):
        printed, _ = process.communicate(timeout=900)
    assert process.returncode == 1, printed
    assert "503 SlowDown" in printed
    assert "Traceback" not in printed
    # Two or three tasks in flight, four tries each, a dozen requests a try for each of eight reads at once.
    assert sum(action is Action.SLOW_DOWN for _, _, action in proxy.seen) < 4 * 4 * 12 * 8
    store = open_store(out)
    assert_all_visible_revisions_are_whole(store)
    assert not list(store.list("CURRENT"))
    assert "going on with job" in run_job_process(*line)
    assert_published_as(calm, out)


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
    assert status == (2 if (fault, option) == ("bucket", "--adapters") else 1)
    assert expected in printed
    assert "not-the-secret" not in printed
    assert "Traceback" not in printed
