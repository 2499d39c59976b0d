"""``evaluate``: the quality of a published bundle, as a table and a line of JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cluster.bundle.reading import Bundle


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="held-out quality of a bundle: base, uncompressed, served, SVD at equal bytes",
        description="Held-out loss, exact match, Rouge-L and agreement (the share of rows with the uncompressed "
        "adapter's own greedy output) of the base, the uncompressed adapters, the adapters as served, and plain SVD in "
        "the same bytes. The last line is one JSON object.",
    )
    parser.add_argument("uri", help="the job's --out, or <out>/bundles/<bundle_id>")
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection that was compressed")
    parser.add_argument("--base", metavar="PATH", required=True, help="the base model's local folder")
    parser.add_argument(
        "--accept-base", metavar="NAME", action="append", default=[], help="as for `run`: further name of the base"
    )
    parser.add_argument("--tasks", metavar="FILE", type=Path, required=True, help="JSON lines: name, question, test")
    parser.add_argument("--rows", metavar="N", type=int, default=32, help="held-out rows an adapter (default: 32)")
    parser.set_defaults(execute=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> int:
    # Here, for transformers is slow to import and --help should not be.
    from compress_jobs.quality.evaluate import evaluate
    from compress_jobs.quality.task import read_tasks

    tasks = read_tasks(parsed.tasks, parsed.rows)
    evaluation = evaluate(Bundle.open(parsed.uri), parsed.base, parsed.adapters, tasks, accept_base=parsed.accept_base)
    print("\n".join(evaluation.lines()))
    print(json.dumps({"adapters": len(evaluation.examiner.base), "rows": parsed.rows} | evaluation.figures()))
    return 0
