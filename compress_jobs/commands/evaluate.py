"""``evaluate``: the quality of a published bundle, as a table and a line of JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.bundle.reading import Bundle

if TYPE_CHECKING:
    from compress_jobs.quality.metrics import Figure


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
    from compress_jobs.quality.evaluate import VARIANTS, evaluate
    from compress_jobs.quality.metrics import METRICS, as_json, figures
    from compress_jobs.quality.scorer import read_tasks

    tasks = read_tasks(parsed.tasks, parsed.rows)
    examiner, scores = evaluate(
        Bundle.open(parsed.uri), parsed.base, parsed.adapters, tasks, accept_base=parsed.accept_base
    )
    print(f"{'loss exact Rouge-L agree':<24}" + "".join(f"{variant:>28}" for variant in VARIANTS))
    for adapter_id in examiner.base:
        rows = (scores[variant][adapter_id] for variant in VARIANTS)
        print(f"{adapter_id:<24}" + "".join(_cell([getattr(row, metric) for metric in METRICS]) for row in rows))
    absolute = {variant: figures(list(scores[variant].values())) for variant in VARIANTS}
    relative = {variant: figures(list(examiner.relative(scores[variant]).values())) for variant in VARIANTS}
    for title, found in (("", absolute), ("relative ", relative)):
        for what in ("mean", "worst", "spread"):
            cells = (_cell([_value(figure, what) for figure in found[variant].values()]) for variant in VARIANTS)
            print(f"{title + what:<24}" + "".join(cells))
    result: dict[str, Any] = {"adapters": len(examiner.base), "rows": parsed.rows}
    for variant in VARIANTS:
        result[variant] = {metric: figure.mean for metric, figure in absolute[variant].items() if figure}
        for key, found in (("over_adapters", absolute), ("relative", relative)):
            result[variant][key] = {metric: as_json(figure) for metric, figure in found[variant].items()}
    print(json.dumps(result))
    return 0


def _value(figure: Figure | None, what: str) -> float | None:
    value: float | None = getattr(figure, what, None)
    return value


def _cell(values: list[float | None]) -> str:
    return f"{' '.join('    -' if value is None else f'{value:5.3f}' for value in values):>28}"
