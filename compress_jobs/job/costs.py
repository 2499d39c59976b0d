"""What a run has spent so far: seconds by phase, bytes read from the collection."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Costs:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.bytes_read = 0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds to the phase's seconds where it is entered again."""
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
