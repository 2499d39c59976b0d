"""The same job and application against a real S3 server: adapters, base and bundle all live there."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bundle.reading import Bundle
from cluster.errors import StoreError, StoreForbidden, StoreMissing, StoreUnreachable
from cluster.store.address import open_store
from serve_app.app import build
from tests.support.jobs import FEW, copy_adapters, object_bytes, run_job
from tests.support.serving import application, ask, ray_with_serve
from tests.support.upload import upload

pytestmark = pytest.mark.slow
PROMPT = "Q: 450 in English words?\nA:"


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
