"""Every command of a changing collection, as the README has them, against a real S3 server."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from cluster.bundle.publish import missing_objects
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import manifest_key, object_key
from cluster.errors import StoreMissing
from cluster.store.address import open_store
from compress_jobs.__main__ import main
from compress_jobs.job import ray_cluster
from tests.support.jobs import copy_adapters, dense_error, dense_served, rewrite, scale_factor_b
from tests.support.processes import assert_all_visible_revisions_are_whole
from tests.support.upload import upload

pytestmark = pytest.mark.slow


@pytest.mark.by_hand
def test_all_commands_in_a_row_on_s3(
    s3_bucket: str,
    base_path: Path,
    zoo_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One Ray for all of it, whose workers have the server's address in their environment.
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)
    try:
        _walk(s3_bucket, base_path, zoo_path, tmp_path, capsys)
    finally:
        ray.shutdown()


def _walk(s3_bucket: str, base_path: Path, zoo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters, base, out = (f"{s3_bucket}/{name}" for name in ("adapters", "base", "out"))
    local = copy_adapters(zoo_path, tmp_path / "adapters", ("number-en", "first-letter", "city-country", "country-fr"))
    upload(local, adapters)
    upload(base_path, base)
    store, source = open_store(out), ["--adapters", adapters, "--base", base]

    def call(command: str, *more: str, status: int = 0) -> str:
        assert main([command, *more]) == status
        printed = capsys.readouterr()
        return printed.out + printed.err

    def assert_errors_are_dense() -> None:
        """On a copy of what the bundle holds, by the tests' own reconstruction."""
        manifest = Bundle.open(out).manifest
        copy = tmp_path / "copy"
        for key in (*map(object_key, manifest.objects), manifest_key(manifest.bundle, manifest.revision)):
            (copy / key).parent.mkdir(parents=True, exist_ok=True)
            (copy / key).write_bytes(store.read(key).data)
        document = {
            "adapters": {i: vars(a) for i, a in manifest.adapters.items()},
            "clusters": {i: vars(c) for i, c in manifest.clusters.items()},
        }
        for adapter_id, adapter in manifest.adapters.items():
            dense = dense_error(local / adapter_id, dense_served(copy, document, adapter_id))
            assert adapter.error == pytest.approx(dense, abs=1e-5), adapter_id
        assert_all_visible_revisions_are_whole(store)

    call("run", *source, "--out", out, "--clusters", "2", "--rank", "8")
    first = Bundle.open(out).manifest

    copy_adapters(zoo_path, local, ("past", "roman"))
    rewrite(local / "roman", use_dora=True)
    upload(local, adapters)
    assert "refused    roman (dora)" in call("add", out, *source)
    assert "past" in Bundle.open(out).manifest.adapters
    assert_errors_are_dense()

    scale_factor_b(local / "city-country", 3.0)
    upload(local / "city-country", f"{adapters}/city-country")
    assert "updated    city-country" in call("update", out, *source)
    assert_errors_are_dense()

    assert "remains    The bases keep a trace" in call("remove", out, "--adapter", "first-letter")
    assert_errors_are_dense()
    removed = Bundle.open(out).manifest
    assert (removed.bundle, removed.revision) == (first.bundle, 3)
    untouched = ("number-en", "country-fr")
    assert [removed.adapters[i].served for i in untouched] == [first.adapters[i].served for i in untouched]

    assert "back       first-letter" in call("rollback", out)
    assert Bundle.open(f"{out}/bundles/{first.bundle}").manifest.revision == 2
    call("rollback", out, "--to", "3", "--allow-drop", "1")

    assert "deleted    nothing" in call("gc", out)  # all of it is younger than a day
    assert "1 revisions" in call("gc", out, "--grace", "0s")
    assert_all_visible_revisions_are_whole(store)

    printed = call("compact", out, *source, "--without", "number-en")
    assert "number-en: never read" in printed
    compacted = Bundle.open(out).manifest
    assert compacted.adapters.keys() == {"city-country", "country-fr", "past"}
    assert compacted.revision == 0
    assert "nothing    drift is not above" in call("compact", out, *source)

    call("gc", out, "--grace", "0s", "--keep", "1")
    with pytest.raises(StoreMissing):
        Bundle.open(f"{out}/bundles/{first.bundle}")
    assert not missing_objects(store, compacted)
    assert {entry.key for entry in store.list("objects/")} == set(map(object_key, compacted.objects))
    assert_errors_are_dense()
