"""``show``: what a bundle holds."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.bundle.reading import Bundle
from compress_jobs.report.contents import show_adapter, show_bundle


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("show", help="print what a bundle holds", description="Print what a bundle holds.")
    parser.add_argument("uri", help="the job's --out (its CURRENT revision), or <out>/bundles/<bundle_id>")
    parser.add_argument("--adapter", metavar="ID", help="one adapter, with all its figures")
    parser.set_defaults(execute=_show)


def _show(parsed: argparse.Namespace) -> int:
    bundle = Bundle.open(parsed.uri)
    print("\n".join(show_adapter(bundle, parsed.adapter) if parsed.adapter else show_bundle(bundle)))
    return 0
