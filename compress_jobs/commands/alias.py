"""``alias``: a name for an adapter, or for several by weight."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.errors import ConfigError
from compress_jobs.lifecycle.alias import list_aliases, remove_alias, set_alias

_ALIAS = """\
A name that clients ask for in place of an adapter's id. It stands for one adapter, or for several by weight:

  alias OUT                                            all aliases, and what is wrong with any
  alias OUT support                                    this one
  alias OUT support --to support-v7                    one adapter
  alias OUT support --to support-v7=90 support-v8=10   a canary: of a hundred users ten get the new one
  alias OUT support --to support-v8                    promoted
  alias OUT support --to support-v7                    rolled back
  alias OUT support --remove

Each is one conditional write of aliases.json beside CURRENT, and makes no revision: a running application follows
within its refresh_interval_s. --to says the whole split; an adapter of weight 0 gets nothing and keeps its place.

Who answers a request is chosen by its header X-Sticky-Key, else by its field user: the same user gets the same adapter,
and where one weight changes only those move that must. Without either it is chosen at random. The answer's header
X-Adapter says which adapter it was.
"""


def add_parser(commands: Any) -> None:
    alias = commands.add_parser(
        "alias",
        help="point a name at an adapter, or at several by weight",
        description=_ALIAS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    alias.add_argument("out", metavar="OUT", help="where the bundle is published")
    alias.add_argument("name", metavar="NAME", nargs="?", help="the alias: one or two plain segments, as ids have")
    change = alias.add_mutually_exclusive_group()
    change.add_argument(
        "--to",
        metavar="ID[=WEIGHT]",
        nargs="+",
        action="extend",
        type=_target,
        help="adapters of the current revision, with whole numbers as weights where there are several",
    )
    change.add_argument("--remove", action="store_true", help="the name stands for nothing any more")
    alias.set_defaults(execute=_execute)


def _target(text: str) -> tuple[str, int | None]:
    adapter_id, split, weight = text.partition("=")
    if split and not (weight.isdecimal() and len(weight) < 10):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an adapter's id, = and a whole number, such as roman=90")
    return adapter_id, int(weight) if split else None


def _execute(parsed: argparse.Namespace) -> int:
    if parsed.name is None and (parsed.to or parsed.remove):
        raise ConfigError(f"{'--to' if parsed.to else '--remove'}: the alias that is meant is missing; give OUT NAME")
    if parsed.to:
        lines = set_alias(parsed.out, parsed.name, _targets(parsed.to))
    elif parsed.remove:
        lines = remove_alias(parsed.out, parsed.name)
    else:
        lines = list_aliases(parsed.out, parsed.name)
    print("\n".join(lines))
    return 0


def _targets(given: list[tuple[str, int | None]]) -> dict[str, int]:
    """Raises ConfigError where an adapter is named twice, or one of several has no weight."""
    targets: dict[str, int] = {}
    for adapter_id, weight in given:
        if adapter_id in targets:
            raise ConfigError(f"--to {adapter_id}: it is there twice; give each adapter once")
        if weight is None and len(given) > 1:
            raise ConfigError(f"--to {adapter_id}: its weight is missing; give each of several one: {adapter_id}=50")
        targets[adapter_id] = 100 if weight is None else weight
    return targets
