"""``remove``: adapters out of the bundle."""

from __future__ import annotations

import argparse
from typing import Any

from compress_jobs.lifecycle.remove import REMAINS, remove_adapters

_REMOVE = f"""\
Take adapters out: they are no longer served, and their cores or factors are in no object of the new revision.

What this does not do: {REMAINS}
Nor does it touch the collection. The id is remembered beside CURRENT: `run`, `add` and `compact` leave its folder out
from now on and say so, until `run` or `add` with --restore brings it back.
"""


def add_parser(commands: Any) -> None:
    remove = commands.add_parser(
        "remove",
        help="take adapters out of the bundle",
        description=_REMOVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    remove.add_argument("out", metavar="OUT", help="where the bundle is published")
    remove.add_argument("--adapter", metavar="ID", nargs="+", action="extend", required=True)
    remove.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> int:
    print("\n".join(remove_adapters(parsed.out, parsed.adapter)))
    return 0
