"""``python -m compress_jobs``: compress a collection of LoRA adapters, look at a bundle, take adapters out again."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.bundle import export
from cluster.errors import ConfigError, CtsError
from compress_jobs.commands import add, plan, show
from compress_jobs.commands import evaluate as evaluate_command
from compress_jobs.commands import sweep as sweep_command
from compress_jobs.job import options
from compress_jobs.lifecycle import compact, remove, rollback
from compress_jobs.lifecycle import gc as garbage
from compress_jobs.report import render as report

COMMANDS = (plan, show, report, export, evaluate_command, sweep_command, add, remove, rollback, compact, garbage)
"""Modules with ``add_parser(commands)``, which names the function to ``execute``; in the order of ``--help``."""

_RUN = """\
Compress a collection of PEFT LoRA adapters into clusters that share a basis, and publish the bundle.

  python -m compress_jobs run --adapters s3://lora/adapters --base s3://lora/base --out s3://lora/bundle \\
      --clusters 25 --rank 16
  ray job submit --working-dir . -- python -m compress_jobs run --config run.toml

Credentials, region and endpoint of s3:// come from the environment as boto3 reads it (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL). A bad adapter is refused by name and the others go on.
Exit status: 0 when the revision is published (or was already), 1 when the job failed, 2 when an option is wrong.
Nothing half-written is ever visible: only CURRENT names what is served, and it moves last.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compress_jobs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    for module in COMMANDS:
        module.add_parser(commands)
    parsed = parser.parse_args(arguments)
    try:
        status: int = parsed.execute(parsed)
        return status
    except ConfigError as error:
        print(f"compress_jobs: {error}", file=sys.stderr)
        return 2
    except CtsError as error:
        print(f"compress_jobs: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "compress_jobs: interrupted; nothing half-written is visible, and the same line goes on from here",
            file=sys.stderr,
        )
        return 130


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="compress a collection and publish it",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_arguments(run)
    run.set_defaults(execute=_run)


def _run(parsed: argparse.Namespace) -> int:
    chosen = options.from_arguments(parsed)
    # Here, for Ray is slow to import and --help should not be.
    from compress_jobs.job import run as job
    from compress_jobs.job import tasks

    prepared = job.prepare(chosen)
    tasks.connect(chosen)
    outcome = job.run(prepared)
    manifest = outcome.manifest
    if outcome.summary is None:
        print("unchanged: these inputs and options are published already, nothing new was written")
        print(f"bundle     {manifest.bundle} revision {manifest.revision} at {chosen.out}")
        return 0
    for line in outcome.summary.lines(manifest):
        print(line)
    print(f"bundle     {manifest.bundle} revision {manifest.revision}, published at {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
