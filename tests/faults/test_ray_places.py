"""The job on Ray clusters as they are: with a token, an empty environment, other versions, nodes that see other files.

What needs no Ray of its own is in tests/compress_jobs/commands/test_messages.py.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra.seaweed import S3Server
from tests.support.paths import REPOSITORY
from tests.support.place import Place
from tests.support.ray_heads import TOKEN, Head, ray_head, ray_node
from tests.support.upload import upload

pytestmark = pytest.mark.slow

WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head")) as head:
        yield head


def options(place: Place, out: str = "") -> list[str]:
    source = ["--adapters", str(place.adapters), "--base", str(place.base)]
    return ["run", *source, "--out", out or str(place.out), "--rank", "2", "--gate", "1"]


def last_line(printed: str) -> str:
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("python -m compress_jobs: ")]
    return line


def test_a_job_joins_a_ray_cluster_by_its_token(head: Head, place: Place) -> None:
    status, printed = head.job(*options(place), **WITH_TOKEN)
    assert status == 0, printed
    assert f"Ray cluster at {head.address}: 1 nodes, 2 CPUs" in printed
    assert len(place.served()) == 6


@pytest.mark.parametrize(
    ("environment", "seen"),
    [
        ({}, "none or another one was given"),
        ({"RAY_AUTH_MODE": "token"}, "none was found here"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token-0123456789"}, "none or another one was given"),
    ],
)
def test_a_token_that_is_missing_or_wrong_is_one_line(
    head: Head, place: Place, environment: dict[str, str], seen: str
) -> None:
    status, printed = head.job(*options(place), **environment)
    assert status == 2
    line = last_line(printed)
    assert f"it wants its token, and {seen}: set RAY_AUTH_MODE=token" in line
    assert "0123456789" not in printed
    assert not (place.out / "CURRENT").exists()


@pytest.mark.by_hand
def test_a_ray_cluster_of_another_version_is_one_line(place: Place, tmp_path: Path) -> None:
    with ray_head(tmp_path / "other", version="2.40.0", dashboard=False) as other:
        status, printed = other.job(*options(place), **WITH_TOKEN)
    assert status == 2
    assert re.search(r"it runs other versions: .*Ray: 2\.40\.0 .*run the job with the versions", last_line(printed))


@pytest.fixture
def submission(tmp_path: Path, place: Place, s3_bucket: str, s3_server: S3Server) -> tuple[Path, list[str]]:
    """The shipped run.toml and runtime_env.yaml, with this store's addresses and credentials filled in."""
    upload(place.base, f"{s3_bucket}/base")
    upload(place.adapters, f"{s3_bucket}/adapters")
    run = (REPOSITORY / "infra" / "job" / "run.toml").read_text()
    checkout = tmp_path / "checkout"
    for name in ("cluster", "compress_jobs", "infra/job"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "infra" / "job" / "run.toml").write_text(
        run.replace("s3://lora", s3_bucket).replace("rank = 16", "rank = 2")
    )
    environment = yaml.safe_load((REPOSITORY / "infra" / "job" / "runtime_env.yaml").read_text())
    environment["env_vars"] |= {
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": s3_server.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
    }
    (tmp_path / "runtime_env.yaml").write_text(yaml.safe_dump(environment))
    return checkout, ["--working-dir", ".", "--runtime-env", str(tmp_path / "runtime_env.yaml")]


RUN = ("python", "-m", "compress_jobs", "run", "--config", "infra/job/run.toml")


def test_the_shipped_files_submit_a_job_to_a_head_with_an_empty_environment(
    head: Head, submission: tuple[Path, list[str]]
) -> None:
    checkout, given = submission
    status, printed = head.submit(*RUN, options=given, cwd=checkout)
    assert status == 0, printed
    assert "published at s3://" in printed


@pytest.mark.by_hand
def test_a_submitted_job_without_credentials_says_on_which_node(head: Head, submission: tuple[Path, list[str]]) -> None:
    checkout, _ = submission
    # Nothing asks the cloud's metadata service here.
    status, printed = head.submit(
        *RUN,
        options=["--working-dir", ".", "--runtime-env-json", '{"env_vars": {"AWS_EC2_METADATA_DISABLED": "true"}}'],
        cwd=checkout,
    )
    assert status != 0
    assert "Unable to locate credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in printed
    assert f"where this runs, on {socket.gethostname()}" in printed
    assert "Traceback" not in printed


@pytest.mark.by_hand
def test_workers_without_the_drivers_credentials_say_on_which_node(
    head: Head, place: Place, s3_bucket: str, s3_server: S3Server
) -> None:
    status, printed = head.job(*options(place, f"{s3_bucket}/out"), **WITH_TOKEN, **s3_server.environment())
    assert status == 1
    assert last_line(printed).endswith(f"where this runs, on {socket.gethostname()}")


@pytest.mark.by_hand
def test_a_submitted_job_writes_nothing_where_nobody_finds_it(
    head: Head, place: Place, submission: tuple[Path, list[str]]
) -> None:
    checkout, given = submission
    line = ("python", "-m", "compress_jobs", *options(place, "bundle"))
    status, printed = head.submit(*line, options=given, cwd=checkout)
    assert status != 0
    assert "--out bundle: a relative path, but a job that was submitted runs in a copy of its working folder" in printed
    assert "inspect:" not in printed


@pytest.fixture(scope="module")
def bare_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A head whose Python has no safetensors."""
    folder = tmp_path_factory.mktemp("bare")
    package = folder / "lacking" / "safetensors"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'safetensors'\", name='safetensors')\n"
    )
    with ray_head(folder, PYTHONPATH=str(package.parent)) as head:
        yield head


@pytest.mark.by_hand
def test_a_head_without_the_packages_is_one_line(
    bare_head: Head, place: Place, submission: tuple[Path, list[str]]
) -> None:
    checkout, given = submission
    status, printed = bare_head.submit(*RUN, options=given, cwd=checkout)
    assert status != 0
    assert "compress_jobs: package safetensors is not installed for" in printed
    assert "Traceback" not in printed

    status, printed = bare_head.job(*options(place), **WITH_TOKEN)
    assert status == 2
    line = last_line(printed)
    assert (
        "cannot run the job's tasks: ModuleNotFoundError: No module named 'safetensors'; install this project" in line
    )


@pytest.mark.by_hand
def test_a_folder_that_another_node_does_not_see_is_refused_before_any_work(
    place: Place, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine gives nobody a mount namespace of his own")
    readable = tmp_path_factory.mktemp("readable")
    hidden = f"{tmp_path} && mount --bind {readable} {readable} && mount -o remount,ro,bind {readable}"
    with ray_head(tmp_path_factory.mktemp("two"), dashboard=False) as head, ray_node(head, hidden):
        status, printed = head.job(*options(place), **WITH_TOKEN)
        assert status == 2
        assert f"--out {place.out}: what this node writes there is not seen on Ray's node " in last_line(printed)
        assert "inspect:" not in printed

        shared = tmp_path_factory.mktemp("shared")
        status, printed = head.job(*options(place, str(shared / "out")), **WITH_TOKEN)
        assert status == 2
        assert re.search(r"--adapters \S+: a\d+/adapter_config.json is not seen on Ray's node ", last_line(printed))

        place.adapters = shutil.copytree(place.adapters, shared / "adapters")
        status, printed = head.job(*options(place, str(readable / "out")), **WITH_TOKEN)
        assert status == 2
        assert re.search(r"--out \S+: cannot be written .* on Ray's node ", last_line(printed))

        status, printed = head.job(*options(place, "relative/out"), **WITH_TOKEN)
        shutil.rmtree(REPOSITORY / "relative")
        assert status == 2
        assert "--out relative/out: a relative path, and Ray has 1 other nodes" in last_line(printed)

        status, printed = head.job(*options(place, str(shared / "out")), **WITH_TOKEN)
        assert status == 0, printed
        assert [path.name for path in (shared / "out" / "work").glob("shared-*")] == []
