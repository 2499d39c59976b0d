"""What several sections of a report say: errors, the verdict on SVD at equal bytes, and how both are found."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.bundle.manifest import Manifest, Method
from compress_jobs.report.page import error_text
from compress_jobs.report.summary import ErrorFigure

Notes = Mapping[str, Any]
"""report.json: any key of it may be missing or null."""


def error_figure(report: Notes, key: str) -> ErrorFigure | None:
    value = report.get(key)
    return ErrorFigure(float(value["mean"]), float(value["worst"]), value["worst_adapter"]) if value else None


def served_error(manifest: Manifest, report: Notes) -> ErrorFigure | None:
    """As the run reports it, else over all that were not opted out."""
    compressed = {name: a.error for name, a in sorted(manifest.adapters.items()) if not raw_pattern(manifest, name)}
    return error_figure(report, "served") or ErrorFigure.of(compressed)


def verdict_on_svd(served: ErrorFigure | None, svd: ErrorFigure | None) -> str:
    """Joint against plain truncation at equal bytes; "" where one of them is not known."""
    if served is None or svd is None:
        return ""
    figures = f"{error_text(served.mean)} against {error_text(svd.mean)}"
    if svd.is_clearly_below(served):
        return (
            f"On this collection plain truncation by SVD wins at equal bytes: mean error of this bundle {figures}. "
            "Joint compression wins where the number of adapters is large against clusters × rank; what it gives here "
            "besides is less traffic per token (a core instead of an adapter's own factors)."
        )
    if served.is_clearly_below(svd):
        less = f"{1 - served.mean / svd.mean:.1%} less"
        return f"At equal bytes this bundle loses {less} than plain truncation by SVD: mean error {figures}."
    return f"At equal bytes this bundle and plain truncation by SVD are within 1% of each other: mean error {figures}."


def svd_beside(report: Notes) -> str:
    svd = error_figure(report, "svd_equal_bytes")
    return f"SVD at equal bytes has a mean error of {error_text(svd.mean)} over the adapters." if svd else ""


def raw_pattern(manifest: Manifest, adapter_id: str) -> str | None:
    return next((pattern for pattern in manifest.method.raw if fnmatch.fnmatchcase(adapter_id, pattern)), None)


def gate_text(method: Method) -> str:
    """The gate, and what it was chosen by where the job chose it."""
    how = {"loss": "by held-out rows", "probe": "by a probe", "paper": "the paper's, without evidence"}
    return f"{method.gate:g}" + (f" ({how[method.evidence]}, to keep {method.keep:g})" if method.evidence else "")


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def is_positive(error: float) -> bool:
    return math.isfinite(error) and error > 0


def by_number(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() and name.isascii() else -1), name
