"""What a replica had to say is in its log, also where it was killed a moment later."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest
import ray
from ray import serve

from cluster.bundle.revisions import object_key
from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import flip_a_byte, write_bundle
from tests.support.serving import ENGINE, PATIENCE_S, ray_with_serve

pytestmark = pytest.mark.slow


def test_warnings_of_a_killed_replicas_engine_are_in_its_log(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    """Serve's settings for throughput, which tests/conftest.py makes, hold back what is no error."""
    out = tmp_path / "out"
    manifest = write_bundle(out, base_path, {"0": {"roman": zoo_path / "roman"}}, {"broken": zoo_path / "past"})
    flip_a_byte(out / object_key(str(manifest.adapters["broken"].factors)))
    with ray_with_serve() as port:
        serve.run(build({"bundle": str(out), "base": str(base_path), "engine": ENGINE}), name="logged")
        app = App(port, "logged")
        wait_until(lambda: app.call("GET", "/ready")[0] == 200, PATIENCE_S)
        [replica] = app.group("group-0")["replicas"]
        [process] = [own for own in psutil.process_iter() if replica_is(own, "logged:group-0")]
        os.kill(process.pid, signal.SIGKILL)
        process.wait(10)
        folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
        log = (folder / f"replica_logged_group-0_{replica}.log").read_text()
    assert "is corrupt" in log


def replica_is(process: psutil.Process, name: str) -> bool:
    try:
        return f"ray::ServeReplica:{name}" in " ".join(process.cmdline())
    except psutil.Error:
        return False
