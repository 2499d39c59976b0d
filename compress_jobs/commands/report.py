"""``report``: a revision's report as a file."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.bundle.reading import Bundle
from cluster.errors import ConfigError, StoreError
from compress_jobs.host.submission import local_file
from compress_jobs.job.finish import complete_page
from compress_jobs.report.render import read_notes, render


def add_parser(commands: Any) -> None:
    """The ``report`` command, among argparse's subparsers."""
    parser = commands.add_parser(
        "report",
        help="write report.html: errors, clusters, bytes and what was refused, with figures",
        description="Write a revision's report as one self-contained HTML file: no script, nothing from elsewhere.",
    )
    parser.add_argument("uri", help="the job's --out (its CURRENT revision), or <out>/bundles/<bundle_id>")
    parser.add_argument("--to", metavar="FILE", default="report.html", help="(default: report.html)")
    parser.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> int:
    target = local_file("--to", parsed.to)
    bundle = Bundle.open(parsed.uri)
    notes = read_notes(bundle)
    document = render(bundle.manifest, notes)
    try:
        target.write_bytes(document.encode())
    except OSError as error:
        raise ConfigError(f"--to {parsed.to}: {error.strerror}; give a file that can be written") from None
    if bundle.manifest.revision == 0:  # made by a run, which writes one beside the manifest
        try:
            complete_page(bundle.store, bundle.manifest, notes)
        except StoreError as error:
            print(f"note: the store lacks report.html and it could not be written there: {error}", file=sys.stderr)
    print(f"wrote {target.resolve()}: bundle {bundle.manifest.bundle} revision {bundle.manifest.revision}")
    return 0
