"""``gc``: delete what no kept revision needs."""

from __future__ import annotations

import argparse
import re
from typing import Any

from cluster.store.address import open_store
from compress_jobs.lifecycle.gc import collect

_GC = """\
Delete what is no longer needed: revisions of CURRENT's bundle beyond the newest ones (CURRENT's own is always kept),
revisions of other bundles, then objects that no kept revision needs, and parts that jobs left under work/.

Kept in any case: what is younger than the grace age; what was written since CURRENT last moved, for a job may be about
to publish it; other bundles, until CURRENT's is as old as the grace age; and every file that is not the project's own,
which is counted. Ages are by the store's clock. With grace 0s make sure that no application serves another bundle or
an old revision: a bundle that is deleted cannot be opened again when a replica restarts.
"""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_parser(commands: Any) -> None:
    gc = commands.add_parser(
        "gc",
        help="delete what no kept revision needs",
        description=_GC,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gc.add_argument("out", metavar="OUT", help="where bundles are published")
    gc.add_argument(
        "--grace",
        metavar="AGE",
        type=duration_s,
        default="24h",
        help="24h, 30m, 0s (default: 24h); younger things stay",
    )
    gc.add_argument("--keep", metavar="N", type=_at_least_one, default=3, help="newest revisions kept (default: 3)")
    gc.add_argument("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")
    gc.set_defaults(execute=_execute)


def duration_s(text: str) -> float:
    """Seconds of "24h", "30m", "0s", "7d". Raises ArgumentTypeError."""
    match = re.fullmatch(r"([0-9]+)([smhd])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no age; expected a whole number and s, m, h or d, such as 24h")
    return float(int(match[1]) * _UNITS_S[match[2]])


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of revisions, 1 or more")
    return int(text)


def _execute(parsed: argparse.Namespace) -> int:
    result = collect(open_store(parsed.out), parsed.grace, parsed.keep, parsed.dry_run)
    verb = "to delete" if parsed.dry_run else "deleted"
    told = ", ".join(f"{count} {kind}" for kind, count in result.deleted.items()) or "nothing"
    print(f"{verb:<10} {told} ({result.num_bytes:,} bytes)")
    print(f"kept       {result.kept_revisions} revisions and the {result.kept_objects} objects they need")
    print(f"too young  {result.too_young} (younger than the grace age, or written since CURRENT last moved)")
    print(f"unknown    {result.unknown} files that are not the project's, left alone")
    return 0
