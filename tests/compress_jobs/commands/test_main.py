"""The command line as a whole: exit status, and what a shell expects of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.bundles import write_bundle
from tests.support.paths import REPOSITORY


def test_a_reader_that_goes_away_ends_a_command_without_a_traceback(
    base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    write_bundle(tmp_path, base_path, {"0": {"past": zoo_path / "past"}}, {})
    reading, writing = os.pipe()
    os.close(reading)
    line = [sys.executable, "-m", "compress_jobs", "show", str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE
