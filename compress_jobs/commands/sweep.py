"""``sweep``: what methods, ranks and numbers of clusters would cost in quality, without publishing anything."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from compress_jobs.commands.collection import add_collection_arguments, base_and_layout
from compress_jobs.host.submission import local_file

_DESCRIPTION = """\
Compress a collection in memory in every combination of method, rank and number of clusters, ask the adapters their
held-out rows, and print a table like the paper's: bytes, squared reconstruction error, and loss, exact match, Rouge-L
and agreement relative to the uncompressed adapter (1: nothing lost), with plain SVD at equal bytes in every row. Then
the curve of relative performance against error, and the gate that follows. Nothing is published.

  python -m compress_jobs sweep --adapters ./adapters --base ./base --tasks tasks.jsonl \\
      --methods jd-full,svd --ranks 4,8,16 --clusters 1,2,4 --rows 16 --out results.jsonl
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="held-out quality over methods, ranks and clusters, without publishing",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_collection_arguments(parser, base_metavar="PATH")
    parser.add_argument("--tasks", metavar="FILE", type=Path, required=True, help="JSON lines: name, question, test")
    parser.add_argument("--methods", metavar="NAMES", default="jd-full,svd", help="default: jd-full,svd")
    parser.add_argument("--ranks", metavar="NUMBERS", type=_numbers, default="4,8,16", help="default: 4,8,16")
    parser.add_argument("--clusters", metavar="NUMBERS", type=_numbers, default="1,2,4", help="default: 1,2,4")
    parser.add_argument("--rows", metavar="N", type=int, default=32, help="held-out rows an adapter (default: 32)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: 0")
    parser.add_argument("--out", metavar="FILE", help="add every row to this file, a line of JSON each")
    parser.set_defaults(execute=_sweep)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _sweep(parsed: argparse.Namespace) -> int:
    # Here, for transformers is slow to import and --help should not be.
    from compress_jobs.progress import say, track
    from compress_jobs.quality.collection import read_collection
    from compress_jobs.quality.examiner import Examiner
    from compress_jobs.quality.scorer import Scorer
    from compress_jobs.quality.sweep import settings, sweep
    from compress_jobs.quality.sweep_table import curve_data, curve_lines, head, line, references
    from compress_jobs.quality.task import read_tasks

    chosen = settings(parsed.methods.split(","), parsed.ranks, parsed.clusters)
    tasks = read_tasks(parsed.tasks, parsed.rows)
    results = _Results(parsed)
    collection = read_collection(parsed.adapters, *base_and_layout(parsed))
    if max(parsed.clusters) > len(collection.adapters):
        raise ConfigError(f"--clusters {max(parsed.clusters)}: more than the {len(collection.adapters)} adapters")
    say(f"{len(collection.adapters)} adapters, {len(chosen)} settings; first the base and the uncompressed adapters")
    examiner = Examiner(Scorer(parsed.base), collection.adapters, tasks)
    results.write(references(examiner, collection.size_bytes))
    print("\n".join(head(examiner, collection.size_bytes)), flush=True)
    rows = []
    for row in track(sweep(collection, examiner, chosen, parsed.seed), len(chosen), "sweep"):
        rows.append(row)
        results.write(
            asdict(row.setting)
            | {"compressed": row.compressed.to_json(), "svd_equal_bytes": row.svd_equal_bytes.to_json()}
        )
        print(line(row, collection.size_bytes), flush=True)
    curves = curve_data(rows)
    results.write({"curves": curves})
    print("\n".join(curve_lines(curves)))
    return 0


class _Results:
    """The result file: lines are added as they come, so that what a stopped sweep has measured is not lost."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._path = local_file("--out", parsed.out) if parsed.out is not None else None
        options = {name: value for name, value in vars(parsed).items() if name not in ("command", "execute")}
        shown = [word for name, value in options.items() for word in _words(f"--{name.replace('_', '-')}", value)]
        self._command = f"python -m compress_jobs sweep {' '.join(shown)}"
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.open("a").close()
            except OSError as error:
                raise ConfigError(f"--out {self._path}: {error.strerror}; give a file that can be written") from None

    def write(self, row: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"command": self._command} | row) + "\n")


def _words(option: str, value: object) -> list[str]:
    """As a shell takes it; nothing where it was not given."""
    if isinstance(value, bool):
        return [option] if value else []
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return [f"{option} {shlex.quote(item)}" for item in value]
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return [f"{option} {shlex.quote(text)}"] if value is not None else []
