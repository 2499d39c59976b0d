"""Environments of clients that do not install beside each other, made once below build/clients."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import REPOSITORY

REQUIREMENTS = REPOSITORY / "tests" / "clients" / "requirements"


def environment(name: str) -> Path:
    """The folder of the programs that requirements/NAME.txt installs."""
    wanted = REQUIREMENTS / f"{name}.txt"
    folder = REPOSITORY / "build" / "clients" / f"{name}-{hashlib.sha256(wanted.read_bytes()).hexdigest()[:12]}"
    if not (folder / ".complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(wanted)]
        subprocess.run([str(folder / "bin" / "python"), *install], check=True)
        (folder / ".complete").touch()
    return folder / "bin"
