"""The demo as `make demo` runs it: what it prints last, when it fails, and that nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from infra.demo.comparison import what_is_off
from tests.support.paths import REPOSITORY

KEYS = {
    *("adapters", "clusters", "rank", "bytes_before", "bytes_after", "error_mean", "error_worst"),
    *("error_mean_svd_equal_bytes", "agreement", "em_base", "em_adapter", "em_served", "seconds"),
}
GOOD = {
    "adapters": 12,
    "bytes_before": 15_000_000,
    "bytes_after": 6_000_000,
    "agreement": 0.97,
    "em_base": 0.06,
    "em_served": 0.74,
}


def test_nothing_is_off_where_all_is_well() -> None:
    assert what_is_off(GOOD, num_shipped=12) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"adapters": 11},
        {"bytes_after": 15_000_000},
        {"agreement": 0.5},
        {"em_served": 0.06},
        {"em_served": float("nan")},
    ],
)
def test_each_thing_that_is_off_is_told(wrong: dict[str, Any]) -> None:
    assert len(what_is_off(GOOD | wrong, num_shipped=12)) == 1


@contextmanager
def demo(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """In a session of its own, of which nothing is left at the end, however this goes."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.demo"],
            cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        for pid in in_session(process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def in_session(session: int) -> set[int]:
    """Living processes of it; Ray's daemons stay in their starter's session."""
    found = set()
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getsid(int(folder.name)) == session and state != "Z":
                found.add(int(folder.name))
    return found


def until(condition: Callable[[], bool], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_demo_ends_with_its_figures_and_leaves_no_process(base_path: Path, tmp_path: Path) -> None:
    with demo(tmp_path / "log") as process:
        status = process.wait(600)
        text = (tmp_path / "log").read_text()
        assert status == 0, text
        last = json.loads(text.splitlines()[-1])
        assert set(last) == KEYS
        assert (last["adapters"], last["clusters"], last["rank"]) == (12, 2, 16)
        until(lambda: not in_session(process.pid), 30)


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_demo_that_is_terminated_takes_all_it_started_with_it(base_path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with demo(log) as process:
        until(lambda: "assemble: " in log.read_text() or process.poll() is not None, 120)
        assert len(in_session(process.pid)) > 3
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
        until(lambda: not in_session(process.pid), 10)
