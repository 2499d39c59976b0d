"""``add`` and ``update``: adapters onto the bases that stand, without a refit."""

from __future__ import annotations

import argparse
from typing import Any

from compress_jobs.commands.source import add_source_arguments, source_of
from compress_jobs.lifecycle.add import add_adapters, update_adapters

_ADD = """\
Put new adapters of the collection onto the bases that stand: each on the cluster that captures most of it, if its error
there meets the bundle's gate, else truncated, else raw. Nothing is fitted anew, so a new adapter loses more on a basis
than one that was fitted: `compact` fits anew when that has gone too far. Publishes the next revision of the bundle; all
objects but the changed clusters' cores are shared with the one before. Where adapters of different tenants are kept
apart, a new one is tried on its own tenant's clusters only.
"""
_UPDATE = """\
Take up the adapters whose source has changed since: each is read, and where its content (weights or config) is not the
version that is served, projected anew as by `add`. Without --adapter all that are served are read once, as by the first
pass of `run`; named ones take seconds. One that is refused now stays served as it was, and is named.
"""


def add_parser(commands: Any) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    add = commands.add_parser(
        "add", help="put new adapters onto the bases that stand", description=_ADD, formatter_class=raw
    )
    add_source_arguments(add, "these only (default: all that the current revision lacks)")
    add.add_argument(
        "--restore",
        metavar="ID",
        nargs="+",
        action="extend",
        default=[],
        help="take these up again",
    )
    add.add_argument("--checkpoints", action="store_true", help="folders within an adapter's folder are adapters too")
    add.set_defaults(execute=lambda parsed: _tell(add_adapters(source_of(parsed))))
    update = commands.add_parser(
        "update", help="take up adapters whose source has changed", description=_UPDATE, formatter_class=raw
    )
    add_source_arguments(update, "these only (default: every one that is served)")
    update.set_defaults(execute=lambda parsed: _tell(update_adapters(source_of(parsed))))


def _tell(lines: list[str]) -> int:
    print("\n".join(lines))
    return 0
