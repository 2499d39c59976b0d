"""The arguments by which a command that publishes nothing is told how to read a collection, as ``run`` is."""

from __future__ import annotations

import argparse

from cluster.adapters.base import BaseModel, read_base
from cluster.adapters.layout import Layout
from compress_jobs.job.options import accepted_names


def add_collection_arguments(parser: argparse.ArgumentParser, base_metavar: str = "URI") -> None:
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection, as for run")
    parser.add_argument("--base", metavar=base_metavar, required=True, help="base model's folder, as for run")
    parser.add_argument("--base-name", metavar="NAME", help="the base's own name, where its config does not say")
    parser.add_argument(
        "--accept-base",
        metavar="PATTERN",
        action="append",
        default=[],
        help="further name of the base, or a pattern with * (repeatable)",
    )
    parser.add_argument("--accept-unnamed-base", action="store_true", help="as for run")
    parser.add_argument("--id-pattern", metavar="PATTERN", action="append", default=[], help="as for run (repeatable)")
    parser.add_argument("--checkpoints", action="store_true", help="as for run")


def base_and_layout(parsed: argparse.Namespace) -> tuple[BaseModel, Layout]:
    """Raises CtsError."""
    accepted = accepted_names(parsed.accept_base, parsed.accept_unnamed_base)
    layout = Layout(tuple(parsed.id_pattern), parsed.checkpoints)
    return read_base(parsed.base, name=parsed.base_name, accept=accepted), layout
