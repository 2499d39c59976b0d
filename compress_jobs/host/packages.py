"""Packages that are not there, as on a Ray node whose image lacks the requirements."""

from __future__ import annotations

import socket
import sys


def lacks(missing: ModuleNotFoundError) -> str:
    """What a person reads who has sent the job there."""
    return (
        f"package {missing.name} is not installed for {sys.executable} on {socket.gethostname()}; install this project "
        "there (`pip install .`), or take an image that holds its requirements"
    )
