"""Ray on this machine, the shipped adapters compressed, and the application that serves them."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from infra.ready import wait_until_ready

REPOSITORY = Path(__file__).parent.parent.parent
ZOO = REPOSITORY / "infra" / "zoo"
BASE = REPOSITORY / "build" / "base"
ENGINE = os.environ.get("ENGINE", "transformers")
# Read by every process of Serve, so they must be set where Ray starts: tokens go from deployment to deployment by gRPC
# instead of Ray's object store, and on the event loop that is there. Not with the router listening on a port of its own
# besides the proxy's, which is for Serve's HAProxy and keeps a stopped application for 30 seconds.
SERVE_SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
NUM_CLUSTERS, RANK = 2, 16
STARTUP_TIMEOUT_S = 180


def set_up_serve() -> None:
    """SERVE_SETTINGS into the environment, but for those that are there; before Serve is imported."""
    for setting, value in SERVE_SETTINGS.items():
        os.environ.setdefault(setting, value)


@contextlib.contextmanager
def running_application(out: Path, port: int) -> Iterator[Any]:
    """Ray on this machine, the shipped adapters compressed into ``out``, the application on 127.0.0.1:``port``.
    Yields the job's outcome; all is shut down at the end."""
    set_up_serve()
    import ray
    from ray import serve

    from compress_jobs.host.cpus import available_cpus
    from compress_jobs.job import ray_cluster
    from compress_jobs.job.options import RunOptions
    from compress_jobs.job.prepare import prepare
    from compress_jobs.job.run import run
    from serve_app.app import build

    num_cpus = max(2, available_cpus())
    options = RunOptions(
        adapters=str(ZOO / "adapters"),
        base=str(BASE),
        out=str(out),
        clusters=NUM_CLUSTERS,
        rank=RANK,
        num_cpus=num_cpus,
    )
    # A Ray of its own, whatever the environment points at.
    os.environ.pop("RAY_ADDRESS", None)
    job = prepare(options)
    ray_cluster.connect(options)
    # So that `make stop`, `kill` and a time limit end it as Ctrl-C does, with all that Ray started. Only now, for
    # Ray sets a handler of its own, which aborts and leaves processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        outcome = run(job)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(
            build(
                {
                    "bundle": str(out),
                    "base": str(BASE),
                    "engine": ENGINE,
                    "device": "cpu",
                    "placement": {"num_cpus": num_cpus - 0.5},
                }
            ),
            name="compress-then-serve",
        )
        yield outcome
    finally:
        ray.shutdown()


def wait_for_application(port: int) -> None:
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/ready?all=1", STARTUP_TIMEOUT_S)
    except RuntimeError as error:
        sys.exit(f"demo: {error}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
