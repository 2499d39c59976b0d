"""Where `add` and `update` take adapters from, and the arguments that say so."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """Where adapters come from, as given on the command line. ``ids`` empty: whatever qualifies."""

    out: str
    adapters: str
    base: str
    ids: tuple[str, ...] = ()
    accept_base: tuple[str, ...] = ()


def add_source_arguments(parser: argparse.ArgumentParser, ids: str) -> None:
    parser.add_argument("out", metavar="OUT", help="where the bundle is published")
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection, as `run` was given it")
    parser.add_argument("--base", metavar="URI", required=True, help="the base model's folder")
    parser.add_argument("--adapter", metavar="ID", nargs="+", action="extend", default=[], help=ids)
    parser.add_argument(
        "--accept-base",
        metavar="NAME",
        action="append",
        default=[],
        help="further name adapters may call this base by (repeatable)",
    )


def source_of(parsed: argparse.Namespace) -> Source:
    ids, accepted = tuple(dict.fromkeys(parsed.adapter)), tuple(parsed.accept_base)
    return Source(parsed.out, parsed.adapters, parsed.base, ids, accepted)


def need_known(ids: Collection[str], known: Collection[str], option: str, expected: str) -> None:
    """Raises ConfigError that names every id which is not known."""
    if unknown := sorted(set(ids) - set(known)):
        raise ConfigError(f"{option} {', '.join(unknown)}: {expected}")
