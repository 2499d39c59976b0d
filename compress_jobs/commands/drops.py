"""The option by which a command is told that adapters may go."""

from __future__ import annotations

import argparse
import re

ALLOW_DROP = "how many adapters that are served may no longer be (default: 0)"


def drops_allowed(text: str) -> int | None:
    """None for "all"."""
    if text == "all":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of adapters, or all")
    return int(text)
