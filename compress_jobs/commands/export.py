"""``export``: an adapter, as it is served, as a standard PEFT LoRA."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.bundle.export import export_adapter
from cluster.bundle.reading import Bundle
from cluster.errors import ConfigError
from compress_jobs.host.submission import local_file


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="write an adapter, as it is served, as a standard PEFT LoRA",
        description="Write what is served for an adapter as a standard PEFT LoRA (B = U S, A = V^T), float32.",
    )
    parser.add_argument("uri", help="the job's --out, or <out>/bundles/<bundle_id>")
    parser.add_argument("--adapter", metavar="ID", required=True)
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to write; must not exist, or be empty")
    parser.set_defaults(execute=_export)


def _export(parsed: argparse.Namespace) -> int:
    target = local_file("--to", parsed.to)
    try:
        num_modules = export_adapter(Bundle.open(parsed.uri), parsed.adapter, target)
    except OSError as error:
        raise ConfigError(f"--to {parsed.to}: {error.strerror}; give a folder that can be written") from None
    print(f"wrote {parsed.adapter} ({num_modules} modules) to {parsed.to}")
    return 0
