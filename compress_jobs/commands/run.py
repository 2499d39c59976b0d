"""``run``: compress a collection and publish it."""

from __future__ import annotations

import argparse
from typing import Any

from compress_jobs.commands.run_options import add_arguments, from_arguments

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


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="compress a collection and publish it",
        description=_RUN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> int:
    chosen = from_arguments(parsed)
    # Here, for Ray is slow to import and --help should not be.
    from compress_jobs.job import ray_cluster
    from compress_jobs.job.prepare import prepare
    from compress_jobs.job.run import run

    job = prepare(chosen)
    ray_cluster.connect(chosen)
    outcome = run(job)
    manifest = outcome.manifest
    if outcome.unfinished:
        print(f"warning    {outcome.unfinished}")
    if outcome.summary is None:
        print("unchanged: these inputs and options are published already, nothing new was written")
        print(f"bundle     {manifest.bundle} revision {manifest.revision} at {chosen.out}")
        return 0
    for line in outcome.summary.lines(manifest):
        print(line)
    print(f"bundle     {manifest.bundle} revision {manifest.revision}, published at {chosen.out}")
    return 0
