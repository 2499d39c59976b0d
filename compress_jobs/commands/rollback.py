"""``rollback``: CURRENT back to an earlier revision."""

from __future__ import annotations

import argparse
from typing import Any

from compress_jobs.commands.drops import ALLOW_DROP, drops_allowed
from compress_jobs.lifecycle.rollback import roll_back

_ROLLBACK = """\
Move CURRENT to its revision's parent, or to the revision named, after checking that everything it needs is there.
Nothing is deleted: `rollback --to` moves forward again, until `gc` deletes what is not kept. What was removed since is
served again, and says so; what is served and the other revision lacks is only dropped with --allow-drop.
"""


def add_parser(commands: Any) -> None:
    rollback = commands.add_parser(
        "rollback",
        help="point CURRENT back to an earlier revision",
        description=_ROLLBACK,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rollback.add_argument("out", metavar="OUT", help="where the bundle is published")
    rollback.add_argument(
        "--to", metavar="REVISION", help="number of a revision, or BUNDLE/NUMBER of another bundle's (default: parent)"
    )
    rollback.add_argument("--allow-drop", metavar="N|all", type=drops_allowed, default="0", help=ALLOW_DROP)
    rollback.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> int:
    print("\n".join(roll_back(parsed.out, parsed.to, parsed.allow_drop)))
    return 0
