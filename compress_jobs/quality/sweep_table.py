"""A sweep as it is told: its table, line by line, and the curves of quality against error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from compress_jobs.quality.examiner import Examiner
from compress_jobs.quality.gate_curve import LEVELS, bins, crossing
from compress_jobs.quality.metrics import as_json, figures
from compress_jobs.quality.sweep import Measured, Row, points

# What the curve is drawn for: the metrics that say how much of its task an adapter still does.
CURVES = ("rouge_l", "exact_match", "loss", "agreement")


def references(examiner: Examiner, size_bytes: int) -> dict[str, Any]:
    variants = {"base": examiner.base, "uncompressed": examiner.uncompressed}
    return {"size_bytes": size_bytes} | {
        name: {adapter_id: as_json(score) for adapter_id, score in scores.items()} for name, scores in variants.items()
    }


def head(examiner: Examiner, size_bytes: int) -> list[str]:
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


def line(row: Row, size_bytes: int) -> str:
    setting, compressed = row.setting, row.compressed
    return (
        f"{setting.method:<8}{setting.clusters or '-':>3}{setting.rank:>4}{compressed.size_bytes:>12,}"
        f"{size_bytes / compressed.size_bytes:>6.1f}x |{_cells(compressed)} |{_cells(row.svd_equal_bytes)}"
    )


def _cells(measured: Measured) -> str:
    errors = list(measured.errors.values())
    cells = [f"{sum(errors) / len(errors):.3f} {max(errors):.3f}"]
    for figure in figures(list(measured.relative.values())).values():
        cells.append(f"{figure.mean:.2f} {figure.worst:5.2f}" if figure else "-")
    return "".join(f"{cell:>12}" for cell in cells)


def curve_data(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """ "joint" and "svd" -> metric -> bins and crossings, as data."""
    curves: dict[str, dict[str, Any]] = {}
    for kind in ("joint", "svd"):
        for metric in CURVES:
            if found := points(rows, metric, joint=kind == "joint"):
                curves.setdefault(kind, {})[metric] = {
                    "bins": [asdict(b) for b in bins(found)],
                    "crossings": [asdict(crossing(found, level)) for level in LEVELS],
                }
    return curves


def curve_lines(curves: dict[str, dict[str, Any]]) -> list[str]:
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
