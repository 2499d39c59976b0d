"""A store that fails once CURRENT has moved: the job has published, says so, and what is missing is completed later."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.seaweed import BUCKET, S3Server
from tests.support.place import Place
from tests.support.processes import job_process
from tests.support.s3_proxy import Action, S3Proxy

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("action", [Action.EXPIRED, pytest.param(Action.DROP, marks=pytest.mark.by_hand)])
def test_a_store_that_fails_after_current_has_moved_has_published_and_is_completed_later(
    place: Place, s3_server: S3Server, s3_bucket: str, action: Action, tmp_path: Path
) -> None:
    moved = False

    def fail_after(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal moved
        if moved:
            return action
        moved = _moves_current(method, path)
        return Action.FORWARD

    out = f"{s3_bucket}/out"
    line = _inputs(place, out)
    with S3Proxy(s3_server, fail_after) as proxy, job_process(*line, AWS_ENDPOINT_URL=proxy.endpoint) as job:
        printed = job.communicate(timeout=180)[0]
    assert job.returncode == 0, printed
    assert "warning    published, but not all beside it is written: head s3://" in printed
    assert "; the next run or `report` completes it" in printed
    assert "published at" in printed
    assert "Traceback" not in printed
    assert not _pages(s3_server, out)

    if action is Action.DROP:
        report = [sys.executable, "-m", "compress_jobs", "report", out, "--to", str(tmp_path / "report.html")]
        subprocess.run(report, check=True)
    else:
        with job_process(*line) as job:
            assert "unchanged:" in job.communicate(timeout=180)[0]
        assert not [key for key in _keys(s3_server, out) if "work" in key.split("/")]
    assert len(_pages(s3_server, out)) == 1


def test_a_compaction_whose_store_fails_after_current_has_moved_has_published(
    place: Place, s3_server: S3Server, s3_bucket: str
) -> None:
    moved = False

    def forbid_after(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal moved
        if moved and "/out/REMOVED" in path:
            return Action.FORBIDDEN
        moved = moved or _moves_current(method, path)
        return Action.FORWARD

    out = f"{s3_bucket}/out"
    source = ["--adapters", str(place.adapters), "--base", str(place.base)]
    with job_process(*source, "--out", out, "--rank", "2") as job:
        assert job.wait(180) == 0
    line = ["compact", out, *source, "--without", "a0", "--num-cpus", "1"]
    with S3Proxy(s3_server, forbid_after) as proxy:
        environment = os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint}
        done = subprocess.run([sys.executable, "-m", "compress_jobs", *line], env=environment)
    assert done.returncode == 0
    assert moved


def test_where_the_answer_about_current_is_lost_with_the_store_the_line_says_so_and_its_twin_tells(
    place: Place, s3_server: S3Server, s3_bucket: str
) -> None:
    moved = False

    def lose(method: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal moved
        if moved:
            return Action.DROP
        moved = _moves_current(method, path)
        return Action.FORWARD_THEN_DROP if moved else Action.FORWARD

    out = f"{s3_bucket}/out"
    line = _inputs(place, out)
    with S3Proxy(s3_server, lose) as proxy, job_process(*line, AWS_ENDPOINT_URL=proxy.endpoint) as job:
        printed = job.communicate(timeout=180)[0]
    assert job.returncode == 1
    assert "whether CURRENT has moved cannot be told: start the same line again" in printed.splitlines()[-1]
    with job_process(*line) as job:
        assert "unchanged:" in job.communicate(timeout=180)[0]
    assert len(_pages(s3_server, out)) == 1


def _inputs(place: Place, out: str) -> list[str]:
    source = ["--adapters", str(place.adapters), "--base", str(place.base)]
    return [*source, "--out", out, "--rank", "2", "--num-cpus", "1"]


def _moves_current(method: str, path: str) -> bool:
    return method == "PUT" and path.endswith("/out/CURRENT")


def _pages(server: S3Server, address: str) -> list[str]:
    return [key for key in _keys(server, address) if key.endswith("/report.html")]


def _keys(server: S3Server, address: str) -> list[str]:
    prefix = address.removeprefix(f"s3://{BUCKET}/")
    pages = server.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]
