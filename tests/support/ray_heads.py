"""Ray clusters as operators start them: with a token, an empty environment, other versions, further nodes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.paths import REPOSITORY

BIN = Path(sys.executable).parent
TOKEN = "test-token-0123456789abcdef0123456789"
_PATIENCE_S = 120
_SMALL = ("--object-store-memory=100000000", "--disable-usage-stats", "--block", "--node-ip-address=127.0.0.1")
# Ray's own command line, of another Ray: what it says of its version is what the GCS tells.
_AS_VERSION = """\
import sys, ray
ray.__version__ = sys.argv[1]
from ray.scripts.scripts import main
sys.argv = ["ray", *sys.argv[2:]]
main()
"""


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    home: Path

    def environment(self, **more: str) -> dict[str, str]:
        """Of a shell on that machine: nothing of this process's own. Ray asks for the token by itself."""
        plain = {"HOME": str(self.home), "PATH": f"{BIN}:/usr/bin:/bin", "RAY_USAGE_STATS_ENABLED": "0"}
        return plain | {"HF_HUB_OFFLINE": "1"} | more

    def run(self, *command: str, cwd: Path = REPOSITORY, timeout_s: int = 180, **more: str) -> tuple[int, str]:
        """Exit status, and all that was printed."""
        done = subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        return done.returncode, done.stdout

    def job(self, *line: str, **more: str) -> tuple[int, str]:
        """``compress_jobs`` in a process that joins this Ray cluster."""
        return self.run(sys.executable, "-m", "compress_jobs", *line, RAY_ADDRESS=self.address, **more)

    def submit(self, *line: str, options: Sequence[str] = (), cwd: Path = REPOSITORY) -> tuple[int, str]:
        """``ray job submit``, with the token. Ray's agent may take a moment after the head is up."""
        deadline = time.monotonic() + _PATIENCE_S
        command = [str(BIN / "ray"), "job", "submit", "--address", self.dashboard, *options, "--", *line]
        while True:
            status, printed = self.run(*command, cwd=cwd, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
            if "No available agent" not in printed or time.monotonic() > deadline:
                return status, printed
            time.sleep(1)


@contextlib.contextmanager
def ray_head(folder: Path, version: str = "", dashboard: bool = True, **environment: str) -> Iterator[Head]:
    """A head with a token, started with nothing in its environment but ``environment``; it may say that it is of
    another ``version`` of Ray."""
    port, dashboard_port, agent_port, client_port = (free_port() for _ in range(4))
    head = Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", folder / "home")
    head.home.mkdir(parents=True)
    # Of its own, and short, for there are sockets in it: a submitted job looks there for its Ray, and would find
    # another one that was started since.
    own_folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ray = [sys.executable, "-c", _AS_VERSION, version] if version else [str(BIN / "ray")]
    command = [
        *(*ray, "start", "--head", f"--port={port}", "--num-cpus=2", *_SMALL),
        *(f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"),
        *(
            f"--temp-dir={own_folder}",
            f"--include-dashboard={dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard_port}",
        ),
    ]
    own = head.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN, **environment)
    try:
        with started(command, own, folder) as process:
            _wait(head, process, dashboard)
            yield head
    finally:
        shutil.rmtree(own_folder, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: Head, hidden: Path | str) -> Iterator[None]:
    """A further node on this machine that has an empty folder of its own where others have ``hidden`` (and
    what a shell makes of it besides)."""
    mount = f"mount -t tmpfs none {hidden} && exec {BIN / 'ray'} start --address={head.address} --num-cpus=1 "
    command = ["unshare", "-Urm", "sh", "-c", mount + " ".join(_SMALL)]
    own = head.environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    with started(command, own, head.home) as process:
        deadline = time.monotonic() + _PATIENCE_S
        status = "import ray; ray.init(logging_level='error'); print(sum(n['Alive'] for n in ray.nodes()))"
        while True:
            environment = {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
            if head.run(sys.executable, "-c", status, **environment)[1].splitlines()[-1:] == ["2"]:
                break
            assert process.poll() is None, "the node ended"
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield


@contextlib.contextmanager
def started(command: Sequence[str], environment: dict[str, str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        # `ray start --block` takes its time over an end that is asked for.
        _kill_session(process.pid)
        process.wait()


def _kill_session(session: int) -> None:
    """Ray's daemons have process groups of their own."""
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def _wait(head: Head, process: subprocess.Popen[bytes], dashboard: bool) -> None:
    host, port = head.address.split(":")
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if dashboard:
                urllib.request.urlopen(f"{head.dashboard}/api/version", timeout=5).close()
            else:
                socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 401:
                return  # it is up, and asks for the token
            assert process.poll() is None, f"{process.args!r} ended"
            assert time.monotonic() < deadline, f"{head}: {error}"
            time.sleep(0.5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
