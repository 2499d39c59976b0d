"""``evaluate``: the quality of a published bundle, as a table and a line of JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.bundle import Bundle


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="held-out loss and exact match: base, uncompressed, served, SVD at equal bytes",
        description="Held-out loss and exact match of the base, the uncompressed adapters, the adapters as served, and "
        "plain SVD in the same bytes. The last line is one JSON object.",
    )
    parser.add_argument("uri", help="the job's --out, or <out>/bundles/<bundle_id>")
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection that was compressed")
    parser.add_argument("--base", metavar="PATH", required=True, help="the base model's local folder")
    parser.add_argument("--tasks", metavar="FILE", type=Path, required=True, help="JSON lines: name, question, test")
    parser.add_argument("--rows", metavar="N", type=int, default=32, help="held-out rows an adapter (default: 32)")
    parser.set_defaults(execute=_evaluate)


def _evaluate(parsed: argparse.Namespace) -> int:
    # Here, for transformers is slow to import and --help should not be.
    from compress_jobs.evaluate import VARIANTS, evaluate, mean_scores, read_tasks

    tasks = read_tasks(parsed.tasks, parsed.rows)
    scores = evaluate(Bundle.open(parsed.uri), parsed.base, parsed.adapters, tasks)
    means = mean_scores(scores)
    print(f"{'loss / exact match':<24}" + "".join(f"{variant:>18}" for variant in VARIANTS))
    for name, row in [*scores.items(), ("mean", means)]:
        cells = (f"{row[variant].loss:9.3f} / {row[variant].exact_match:5.3f}" for variant in VARIANTS)
        print(f"{name:<24}" + "".join(f"{cell:>18}" for cell in cells))
    print(json.dumps({"adapters": len(scores), "rows": parsed.rows} | {v: asdict(means[v]) for v in VARIANTS}))
    return 0
