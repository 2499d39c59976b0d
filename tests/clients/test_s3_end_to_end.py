"""The same job and application against a real S3 server: adapters, base and bundle all live there."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from cluster.bundle.reading import Bundle
from cluster.errors import StoreError, StoreForbidden, StoreMissing, StoreUnreachable
from cluster.store.address import open_store
from serve_app.app import build
from tests.support.jobs import FEW, copy_adapters, object_bytes, run_job
from tests.support.processes import running
from tests.support.serving import application, ask, ray_with_serve
from tests.support.upload import upload

pytestmark = pytest.mark.slow
PROMPT = "Q: 450 in English words?\nA:"


@pytest.mark.by_hand
def test_adapters_base_and_bundle_on_s3_serve_what_local_folders_do(
    s3_bucket: str, base_path: Path, zoo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = copy_adapters(zoo_path, tmp_path / "adapters")
    adapters, base = upload(local, f"{s3_bucket}/adapters"), upload(base_path, f"{s3_bucket}/base")
    # The replica keeps its copy of the base here.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with ray_with_serve() as port:
        on_s3 = run_job(adapters, base, f"{s3_bucket}/out", clusters=2, rank=16)
        on_disk = run_job(local, base_path, tmp_path / "out", clusters=2, rank=16)
        assert on_s3.manifest.bundle == on_disk.manifest.bundle
        store = open_store(f"{s3_bucket}/out")
        stored = {entry.key.removeprefix("objects/"): store.read(entry.key).data for entry in store.list("objects/")}
        assert stored == object_bytes(tmp_path / "out")
        assert run_job(adapters, base, f"{s3_bucket}/out", clusters=2, rank=16).summary is None
        answers = []
        for bundle, base_address in ((f"{s3_bucket}/out", base), (str(tmp_path / "out"), str(base_path))):
            with application(port, bundle=bundle, base=base_address, device="cpu") as client:
                assert {model.id for model in client.models.list()} == {*FEW, on_s3.manifest.base.name}
                answers.append({name: ask(client, name, PROMPT, 8) for name in FEW})
        assert answers[0] == answers[1]
    assert Bundle.open(f"{s3_bucket}/out/bundles/{on_s3.manifest.bundle}").manifest.adapters.keys() == set(FEW)


def test_a_folder_copied_changed_and_deleted_is_followed_by_watch_and_the_running_application(
    s3_bucket: str, base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    every_s, refresh_s, load_s = 2, 2, 30  # the load is of a busy machine
    adapters, out = upload(copy_adapters(zoo_path, tmp_path / "adapters"), f"{s3_bucket}/adapters"), f"{s3_bucket}/out"
    store = open_store(adapters)
    watch = [sys.executable, "-m", "compress_jobs", "watch", out, "--adapters", adapters, "--base", str(base_path)]
    with ray_with_serve() as port:
        run_job(adapters, base_path, out, clusters=2, rank=16)
        arguments = {"bundle": out, "base": str(base_path), "device": "cpu", "refresh_interval_s": refresh_s}
        with application(port, **arguments) as client, running(*watch, "--every", f"{every_s}s"):

            def served() -> str | None:
                """What answers as "newcomer"; None where nothing does."""
                try:
                    answer = client.completions.with_raw_response.create(
                        model="newcomer", prompt=PROMPT, max_tokens=1, temperature=0
                    )
                except openai.NotFoundError:
                    return None
                return answer.headers["X-Served-Revision"]

            def seconds_until(is_there: Callable[[str | None], bool]) -> float:
                began = time.monotonic()
                while not is_there(served()):
                    assert time.monotonic() - began < every_s + refresh_s + load_s
                    time.sleep(0.1)
                return time.monotonic() - began

            time.sleep(6)  # so that the first round is over: Python and torch take their time
            assert served() is None
            upload(zoo_path / "roman", f"{adapters}/newcomer")
            took = [seconds_until(lambda revision: revision is not None)]
            first = served()
            upload(zoo_path / "past", f"{adapters}/newcomer")
            took.append(seconds_until(lambda revision: revision != first))
            assert served() is not None
            for entry in store.list("newcomer/"):
                store.delete(entry.key)
            took.append(seconds_until(lambda revision: revision is None))
    print("answered, changed and gone after", ", ".join(f"{seconds:.1f} s" for seconds in took))


@pytest.mark.parametrize(
    ("variable", "value", "bucket", "error", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "not-the-secret", None, StoreForbidden, "check AWS_SECRET_ACCESS_KEY"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", None, StoreUnreachable, "127.0.0.1:9.*check AWS_ENDPOINT_URL"),
        ("AWS_REGION", "us-east-1", "s3://no-such-bucket", StoreMissing, "NoSuchBucket.*create the bucket"),
    ],
)
def test_an_application_whose_store_cannot_be_used_is_refused_with_a_message_of_its_own(
    s3_bucket: str,
    base_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    bucket: str | None,
    error: type[StoreError],
    said: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=said):
        build({"bundle": f"{bucket or s3_bucket}/out", "base": str(base_path)})
