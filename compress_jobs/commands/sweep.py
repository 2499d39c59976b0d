"""``sweep``: what methods, ranks and numbers of clusters would cost in quality, without publishing anything."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from compress_jobs.quality.examiner import Examiner
    from compress_jobs.quality.sweep import Measured, Row

_DESCRIPTION = """\
Compress a collection in memory in every combination of method, rank and number of clusters, ask the adapters their
held-out rows, and print a table like the paper's: bytes, squared reconstruction error, and loss, exact match, Rouge-L
and agreement relative to the uncompressed adapter (1: nothing lost), with plain SVD at equal bytes in every row. Then
the curve of relative performance against error, and the gate that follows. Nothing is published.

  python -m compress_jobs sweep --adapters ./adapters --base ./base --tasks tasks.jsonl \\
      --methods jd-full,svd --ranks 4,8,16 --clusters 1,2,4 --rows 16 --out results.jsonl
"""

# What the curve is drawn for: the metrics that say how much of its task an adapter still does.
CURVES = ("rouge_l", "exact_match", "loss", "agreement")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="held-out quality over methods, ranks and clusters, without publishing",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", metavar="URI", required=True, help="the collection")
    parser.add_argument("--base", metavar="PATH", required=True, help="the base model's local folder")
    parser.add_argument("--tasks", metavar="FILE", type=Path, required=True, help="JSON lines: name, question, test")
    parser.add_argument("--methods", metavar="NAMES", default="jd-full,svd", help="default: jd-full,svd")
    parser.add_argument("--ranks", metavar="NUMBERS", type=_numbers, default="4,8,16", help="default: 4,8,16")
    parser.add_argument("--clusters", metavar="NUMBERS", type=_numbers, default="1,2,4", help="default: 1,2,4")
    parser.add_argument("--rows", metavar="N", type=int, default=32, help="held-out rows an adapter (default: 32)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: 0")
    parser.add_argument("--out", metavar="FILE", type=Path, help="add every row to this file, a line of JSON each")
    parser.set_defaults(execute=_sweep)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _sweep(parsed: argparse.Namespace) -> int:
    # Here, for transformers is slow to import and --help should not be.
    from compress_jobs.progress import say, track
    from compress_jobs.quality.collection import read_collection
    from compress_jobs.quality.examiner import Examiner
    from compress_jobs.quality.scorer import Scorer, read_tasks
    from compress_jobs.quality.sweep import settings, sweep

    chosen = settings(parsed.methods.split(","), parsed.ranks, parsed.clusters)
    tasks = read_tasks(parsed.tasks, parsed.rows)
    results = _Results(parsed)
    collection = read_collection(parsed.adapters, parsed.base)
    if max(parsed.clusters) > len(collection.adapters):
        raise ConfigError(f"--clusters {max(parsed.clusters)}: more than the {len(collection.adapters)} adapters")
    say(f"{len(collection.adapters)} adapters, {len(chosen)} settings; first the base and the uncompressed adapters")
    examiner = Examiner(Scorer(parsed.base), collection.adapters, tasks)
    results.write(_references(examiner, collection.size_bytes))
    print("\n".join(_head(examiner, collection.size_bytes)), flush=True)
    rows = []
    for row in track(sweep(collection, examiner, chosen, parsed.seed), len(chosen), "sweep"):
        rows.append(row)
        results.write(
            asdict(row.setting)
            | {"compressed": row.compressed.to_json(), "svd_equal_bytes": row.svd_equal_bytes.to_json()}
        )
        print(_line(row, collection.size_bytes), flush=True)
    results.write({"curves": _curves(rows)})
    print("\n".join(_curve_lines(_curves(rows))))
    return 0


class _Results:
    """The result file: lines are added as they come, so that what a stopped sweep has measured is not lost."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self._path: Path | None = parsed.out
        options = {name: value for name, value in vars(parsed).items() if name not in ("command", "execute")}
        shown = [f"--{name} {shlex.quote(_text(value))}" for name, value in options.items() if value is not None]
        self._command = f"python -m compress_jobs sweep {' '.join(shown)}"
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._path.touch()
            except OSError as error:
                raise ConfigError(f"--out {self._path}: {error.strerror}; give a file that can be written") from None

    def write(self, row: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps({"command": self._command} | row) + "\n")


def _text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _references(examiner: Examiner, size_bytes: int) -> dict[str, Any]:
    from compress_jobs.quality.metrics import as_json

    variants = {"base": examiner.base, "uncompressed": examiner.uncompressed}
    return {"size_bytes": size_bytes} | {
        name: {adapter_id: as_json(score) for adapter_id, score in scores.items()} for name, scores in variants.items()
    }


def _head(examiner: Examiner, size_bytes: int) -> list[str]:
    from compress_jobs.quality.metrics import figures

    lines = [f"{len(examiner.base)} adapters with held-out rows; uncompressed {size_bytes:,} bytes", ""]
    lines.append(f"{'mean (worst)':<24}{'loss':>16}{'exact match':>16}{'Rouge-L':>16}")
    for name, scores in (("base", examiner.base), ("uncompressed", examiner.uncompressed)):
        found = figures(list(scores.values()))
        cells = [found[metric] for metric in ("loss", "exact_match", "rouge_l")]
        lines.append(f"{name:<24}" + "".join(f"{f'{c.mean:.3f} ({c.worst:.3f})' if c else '-':>16}" for c in cells))
    lines += [
        "",
        "relative to the uncompressed adapter (1: nothing lost), mean and worst; right: plain SVD, same bytes",
    ]
    columns = "".join(f"{name:>12}" for name in ("error", "loss", "exact", "Rouge-L", "agree"))
    lines.append(f"{'method':<8}{'k':>3}{'r':>4}{'bytes':>12}{'fewer':>7} |{columns} |{columns}")
    return lines


def _line(row: Row, size_bytes: int) -> str:
    setting, compressed = row.setting, row.compressed
    return (
        f"{setting.method:<8}{setting.clusters or '-':>3}{setting.rank:>4}{compressed.size_bytes:>12,}"
        f"{size_bytes / compressed.size_bytes:>6.1f}x |{_cells(compressed)} |{_cells(row.svd_equal_bytes)}"
    )


def _cells(measured: Measured) -> str:
    from compress_jobs.quality.metrics import figures

    errors = list(measured.errors.values())
    cells = [f"{sum(errors) / len(errors):.3f} {max(errors):.3f}"]
    for figure in figures(list(measured.relative.values())).values():
        cells.append(f"{figure.mean:.2f} {figure.worst:5.2f}" if figure else "-")
    return "".join(f"{cell:>12}" for cell in cells)


def _curves(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """ "joint" and "svd" -> metric -> bins and crossings, as data."""
    from compress_jobs.quality.gate_curve import LEVELS, bins, crossing
    from compress_jobs.quality.sweep import points

    curves: dict[str, dict[str, Any]] = {}
    for kind in ("joint", "svd"):
        for metric in CURVES:
            if found := points(rows, metric, joint=kind == "joint"):
                curves.setdefault(kind, {})[metric] = {
                    "bins": [asdict(b) for b in bins(found)],
                    "crossings": [asdict(crossing(found, level)) for level in LEVELS],
                }
    return curves


def _curve_lines(curves: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for kind, by_metric in curves.items():
        title = "on a shared basis" if kind == "joint" else "by SVD, at equal bytes and by rank"
        lines += ["", f"adapters {title}: relative performance by squared error, mean (worst)"]
        lines.append(f"{'error':<16}{'points':>8}" + "".join(f"{metric:>16}" for metric in by_metric))
        edges = sorted({(b["low"], b["high"]) for curve in by_metric.values() for b in curve["bins"]})
        for low, high in edges:
            found = [
                next((b for b in curve["bins"] if (b["low"], b["high"]) == (low, high)), None)
                for curve in by_metric.values()
            ]
            cells = "".join(f"{'{mean:.3f} ({worst:.2f})'.format(**b) if b else '-':>16}" for b in found)
            lines.append(f"{f'{low:g} .. {high:g}':<16}{max(b['num_points'] for b in found if b):>8}{cells}")
        for metric, curve in by_metric.items():
            for at in curve["crossings"]:
                lines.append(f"  {metric} keeps {at['level']} " + _crossing_text(at))
    if "joint" in curves and "rouge_l" in curves["joint"]:
        at = curves["joint"]["rouge_l"]["crossings"][0]
        lines += ["", f"gate: adapters on a basis keep {at['level']} of their Rouge-L {_crossing_text(at)}"]
    return lines


def _crossing_text(at: dict[str, Any]) -> str:
    if not at["reached"]:
        return f"at every error seen, the largest {at['error']:.3f}"
    return f"up to the error {at['error']:.3f} ({at['lowest']:.3f} .. {at['highest']:.3f} leaving out one adapter)"
