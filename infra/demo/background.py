"""``make serve`` and ``make stop``: the application in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from infra.demo.application import (
    REPOSITORY,
    STARTUP_TIMEOUT_S,
    free_port,
    is_free,
    running_application,
    wait_for_application,
)
from infra.demo.comparison import read_questions

SERVED = REPOSITORY / "build" / "served"  # what `make serve` publishes, its process id and log


def serve_in_background() -> int:
    """Start the application in a process of its own, wait for it, say how to ask it."""
    SERVED.mkdir(parents=True, exist_ok=True)
    pid_file, log = SERVED / "pid", SERVED / "log"
    if (pid := running_pid()) is not None:
        sys.exit(f"serve: already running (process {pid}); `make stop` ends it")
    port = 8000 if is_free(8000) else free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.demo", "serve-here", "--port", str(port)],
            cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    pid_file.write_text(str(process.pid))
    print(f"compressing and starting; log: {log.relative_to(REPOSITORY)}", flush=True)
    deadline = time.monotonic() + STARTUP_TIMEOUT_S
    while "ready\n" not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > deadline:
            stop()
            sys.exit(f"serve: it did not start; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:]))
        time.sleep(0.5)
    question = next(question for question in read_questions() if question.adapter == "number-en")
    body = json.dumps(
        {"model": "number-en", "prompt": question.prompt, "max_tokens": 16, "temperature": 0, "stop": "\n"}
    )
    print(f"running on http://127.0.0.1:{port} (`make stop` ends it); try:\n")
    print(f"curl -s http://127.0.0.1:{port}/v1/completions -H 'Content-Type: application/json' -d '{body}'")
    return 0


def serve_here(port: int) -> int:
    """The background process itself."""
    with running_application(SERVED / "bundle", port):
        wait_for_application(port)
        print("ready", flush=True)
        while True:
            time.sleep(3600)


def stop() -> int:
    pid = running_pid()
    if pid is None:
        print("serve: nothing is running")
        return 0
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while running_pid() is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    if running_pid() is not None:
        # Its own session: this reaches Ray's processes too.
        os.killpg(pid, signal.SIGKILL)
    (SERVED / "pid").unlink(missing_ok=True)
    print("stopped")
    return 0


def running_pid() -> int | None:
    """The background process, if it is alive and really ours (a process id may have been given to another)."""
    try:
        pid = int((SERVED / "pid").read_text())
        ours = "infra.demo" in Path(f"/proc/{pid}/cmdline").read_text()
        alive = " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ValueError):
        return None
    return pid if ours and alive else None
