"""The option by which a command is told that adapters may go."""

from __future__ import annotations

import argparse

from compress_jobs.job.options import DROPS

ALLOW_DROP = "how many adapters that are served may no longer be (default: 0)"


def drops_allowed(text: str) -> str:
    if DROPS.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of adapters, or all")
    return text
