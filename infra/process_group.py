"""Ending a command with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress


def end_group(process: subprocess.Popen[bytes], patience_s: float = 30) -> None:
    """SIGTERM to the process group that ``process`` leads, and SIGKILL to what is left of it when the leader has ended,
    or after ``patience_s``."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
