"""The arguments by which ``add`` and ``update`` are told where adapters come from."""

from __future__ import annotations

import argparse

from compress_jobs.job.options import accepted_names
from compress_jobs.lifecycle.source import Source


def add_source_arguments(parser: argparse.ArgumentParser, ids: str | None) -> None:
    """``ids``: what --adapter means; None where the command takes no ids."""
    parser.add_argument("out", metavar="OUT", help="where the bundle is published")
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection, as `run` was given it")
    parser.add_argument("--base", metavar="URI", required=True, help="the base model's folder")
    if ids is not None:
        parser.add_argument("--adapter", metavar="ID", nargs="+", action="extend", default=[], help=ids)
    parser.add_argument(
        "--accept-base",
        metavar="NAME",
        action="append",
        default=[],
        help="further name adapters may call this base by, or a pattern with *, for all later revisions (repeatable)",
    )
    parser.add_argument(
        "--id-pattern",
        metavar="PATTERN",
        action="append",
        default=[],
        help="as for `run`, in place of what the manifest has, for all later revisions (repeatable)",
    )
    parser.add_argument(
        "--accept-unnamed-base", action="store_true", help="adapters whose config names no base are accepted"
    )


def source_of(parsed: argparse.Namespace) -> Source:
    ids = tuple(dict.fromkeys(getattr(parsed, "adapter", ())))
    accepted = accepted_names(parsed.accept_base, parsed.accept_unnamed_base)
    restore, checkpoints = tuple(getattr(parsed, "restore", ())), getattr(parsed, "checkpoints", False)
    patterns = tuple(parsed.id_pattern)
    return Source(parsed.out, parsed.adapters, parsed.base, ids, accepted, restore, checkpoints, patterns)
