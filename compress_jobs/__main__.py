"""``python -m compress_jobs``, or ``compress-jobs`` where the project is installed: the commands of the job."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import sys
from pathlib import Path

from cluster.errors import ConfigError, CtsError
from compress_jobs.host.packages import lacks

try:
    from compress_jobs.commands import (
        add,
        alias,
        compact,
        evaluate,
        export,
        gc,
        plan,
        remove,
        report,
        rollback,
        run,
        show,
        sweep,
        watch,
    )
except ModuleNotFoundError as missing:  # on a Ray node whose image lacks the requirements
    if __name__ != "__main__":
        raise
    print(f"compress_jobs: {lacks(missing)}", file=sys.stderr)
    sys.exit(2)

_DESCRIPTION = "Compress a collection of LoRA adapters, look at a bundle, change what it serves."

COMMANDS = (run, plan, show, report, export, evaluate, sweep, add, remove, rollback, alias, watch, compact, gc)
"""Modules with ``add_parser(commands)``, which names the function to ``execute``; in the order of ``--help``."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where the command failed; 2 where an option is wrong; 128 and a signal's number
    where it was interrupted, or nobody reads its output any more."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.execute(parsed)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except CtsError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as missing:
        print(f"{parser.prog}: {lacks(missing)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"{parser.prog}: interrupted; nothing half-written is visible, and the same line goes on from here",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone (`show | head`). Python would try to write what is left at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def make_parser() -> argparse.ArgumentParser:
    """Of all commands; what it parses has ``execute``, the function that is to be called with it."""
    is_script = Path(sys.argv[0]).name == "compress-jobs"
    parser = argparse.ArgumentParser(
        prog="compress-jobs" if is_script else "python -m compress_jobs", description=_DESCRIPTION
    )
    parser.add_argument("--version", action="version", version=f"compress-then-serve {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("compress-then-serve")
    except importlib.metadata.PackageNotFoundError:  # a working directory that `ray job submit` has sent
        return "(not installed: a checkout)"


if __name__ == "__main__":
    sys.exit(main())
