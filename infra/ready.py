"""Waiting for a server that is starting."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable
from time import monotonic, sleep


def wait_until_ready(url: str, timeout_s: float, is_alive: Callable[[], bool] = lambda: True) -> None:
    """Returns at the first answer of ``url`` with a status below 400.

    Raises:
        RuntimeError: there was none in ``timeout_s`` seconds, or ``is_alive`` said that nobody will.
    """
    deadline = monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if not is_alive():
                raise RuntimeError(f"{url}: the server ended before it was ready; see what it printed") from error
            if monotonic() > deadline:
                raise RuntimeError(f"{url}: not ready after {timeout_s:.0f} s: {error}") from error
        sleep(0.5)
