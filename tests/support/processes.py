"""Commands as processes of their own: the job, to be killed, and what must hold of the store afterwards; servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cluster.bundle.publish import missing_objects
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import read_current, read_manifest
from cluster.store.protocol import Store
from infra.process_group import end_group
from tests.support.paths import REPOSITORY


@contextlib.contextmanager
def job_process(*line: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """``compress_jobs run`` in a session of its own, gone at the end. With run_job's gate where none is given."""
    gate = () if {"--gate", "--config"} & set(line) else ("--gate", "0.25")
    process = subprocess.Popen(
        [sys.executable, "-m", "compress_jobs", "run", *line, *gate],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )
    try:
        yield process
    finally:
        kill_session(process)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def running(*command: str, cwd: Path = REPOSITORY, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, which is gone at the end."""
    process = subprocess.Popen(command, cwd=cwd, env=os.environ | environment, start_new_session=True)
    try:
        yield process
    finally:
        end_group(process)


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the driver and all that it started: Ray's daemons have process groups of their own."""
    for pid in processes_named("", process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def processes_named(name: str, session: int) -> list[int]:
    """Processes of the session whose title begins so (a Ray worker's title is the task it is running)."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_running(name, pid, session)]


def is_running(name: str, pid: int, session: int) -> bool:
    with contextlib.suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
        return title.startswith(name) and os.getsid(pid) == session
    return False


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
                assert not opened.load_home(home).failed


def run_job_process(*line: str, **environment: str) -> str:
    """What it printed. It ended well."""
    with job_process(*line, **environment) as process:
        return ended_well(process)


def ended_well(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == 0, printed
    assert "Traceback" not in printed, printed
    return printed
