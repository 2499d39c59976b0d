"""Methods x ranks x clusters, compressed in memory and asked the held-out rows: the paper's tables.

In every row, plain SVD may spend the same bytes. Base and uncompressed adapters are asked once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.compression.methods import METHODS
from cluster.errors import ConfigError
from compress_jobs.quality.collection import (
    Collection,
    Compressed,
    compress_jointly,
    truncate_to_bytes,
    truncate_to_rank,
)
from compress_jobs.quality.examiner import Examiner
from compress_jobs.quality.gate_curve import Point
from compress_jobs.quality.metrics import Relative, Score, as_json, figures

SVD = "svd"


@dataclass(frozen=True)
class Setting:
    """``clusters`` is None for SVD, which has none."""

    method: str
    rank: int
    clusters: int | None


@dataclass(frozen=True)
class Measured:
    """A compressed collection and what its adapters still know; ``scores`` of those that have a task."""

    size_bytes: int
    errors: dict[str, float]
    scores: dict[str, Score]
    relative: dict[str, Relative]

    @staticmethod
    def of(compressed: Compressed, examiner: Examiner) -> Measured:
        scores = examiner.examine(compressed.factors)
        return Measured(compressed.size_bytes, compressed.errors, scores, examiner.relative(scores))

    def points(self, metric: str) -> list[Point]:
        return [
            Point(adapter_id, self.errors[adapter_id], value)
            for adapter_id, row in self.relative.items()
            if (value := getattr(row, metric)) is not None
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "size_bytes": self.size_bytes,
            "error_mean": round(math.fsum(self.errors.values()) / len(self.errors), 5),
            "error_worst": round(max(self.errors.values()), 5),
            "figures": {metric: as_json(figure) for metric, figure in figures(list(self.scores.values())).items()},
            "relative": {metric: as_json(figure) for metric, figure in figures(list(self.relative.values())).items()},
            "adapters": {
                adapter_id: {"error": round(self.errors[adapter_id], 5)} | (as_json(row) or {})
                for adapter_id, row in self.scores.items()
            },
        }


@dataclass(frozen=True)
class Row:
    setting: Setting
    compressed: Measured
    svd_equal_bytes: Measured


def settings(methods: Sequence[str], ranks: Sequence[int], clusters: Sequence[int]) -> list[Setting]:
    """Every combination. Raises ConfigError for a method that does not exist and numbers below 1."""
    known = [*METHODS, SVD]
    for method in methods:
        if method not in known:
            raise ConfigError(f"--methods {method}: unknown; expected some of {', '.join(known)}")
    for option, values in (("--ranks", ranks), ("--clusters", clusters)):
        if not values or min(values) < 1:
            raise ConfigError(f"{option} {','.join(map(str, values))}: expected numbers of at least 1")
    found = []
    for method in methods:
        for rank in ranks:
            found += [Setting(method, rank, k) for k in ([None] if method == SVD else clusters)]
    return found


def sweep(collection: Collection, examiner: Examiner, chosen: Sequence[Setting], seed: int) -> Iterator[Row]:
    """A row a setting, as soon as it is measured. Deterministic in its arguments; no setting may have more clusters
    than there are adapters."""
    for setting in chosen:
        if setting.clusters is None:
            compressed = truncate_to_rank(collection.adapters, setting.rank)
        else:
            labels = collection.labels(setting.clusters, setting.rank, seed)
            compressed = compress_jointly(collection, labels, METHODS[setting.method], setting.rank, seed)
        svd = truncate_to_bytes(collection.adapters, compressed.size_bytes)
        yield Row(setting, Measured.of(compressed, examiner), Measured.of(svd, examiner))


def points(rows: Sequence[Row], metric: str, *, joint: bool) -> list[Point]:
    """Every adapter in every setting: on a shared basis (``joint``), or by SVD at equal bytes and equal rank."""
    if joint:
        return [point for row in rows if row.setting.clusters for point in row.compressed.points(metric)]
    alone = [row.compressed for row in rows if not row.setting.clusters] + [row.svd_equal_bytes for row in rows]
    return [point for measured in alone for point in measured.points(metric)]
