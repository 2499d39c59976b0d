"""Relative performance against reconstruction error, adapter by adapter, and the gate that follows from it.

A single adapter's relative performance is coarse (of 16 rows, one more or less is 6%), so the curve is the best
non-increasing one through all points, in least squares (isotonic regression by pool-adjacent-violators: Ayer et
al., 1955). Points of one adapter are alike, so the range beside a crossing leaves out one adapter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BIN_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
LEVELS = (0.99, 0.95)


@dataclass(frozen=True)
class Point:
    """One adapter in one setting: its squared relative error, and what is left of its performance there."""

    adapter_id: str
    error: float
    relative: float


@dataclass(frozen=True)
class Bin:
    """Points with low < error <= high."""

    low: float
    high: float
    num_points: int
    mean: float
    worst: float


@dataclass(frozen=True)
class Crossing:
    """Up to ``error`` the curve keeps ``level``; ``lowest`` and ``highest`` with one adapter left out.
    ``reached``: whether any point lies beyond, i.e. whether the curve was seen to fall under the level."""

    level: float
    error: float
    lowest: float
    highest: float
    reached: bool


def bins(points: Sequence[Point]) -> list[Bin]:
    """Those that hold a point; errors above the last edge are in the last one."""
    found = []
    for low, high in zip((-math.inf, *BIN_EDGES[:-1]), (*BIN_EDGES[:-1], math.inf), strict=True):
        values = [point.relative for point in points if low < point.error <= high]
        if values:
            shown = max(low, 0.0), min(high, BIN_EDGES[-1])
            found.append(Bin(*shown, len(values), math.fsum(values) / len(values), min(values)))
    return found


def falling_fit(points: Sequence[Point]) -> list[tuple[float, float]]:
    """(largest error of a block, its level), errors ascending, levels descending: the non-increasing step function
    of least squares. Points of equal error are one before all else."""
    blocks: list[tuple[float, float, int]] = []  # largest error, sum, count
    for point in sorted(points, key=lambda point: point.error):
        error, total, count = point.error, point.relative, 1
        if blocks and blocks[-1][0] == error:
            _, before, num_before = blocks.pop()
            total, count = total + before, count + num_before
        while blocks and blocks[-1][1] / blocks[-1][2] <= total / count:
            _, before, num_before = blocks.pop()
            total, count = total + before, count + num_before
        blocks.append((error, total, count))
    return [(error, total / count) for error, total, count in blocks]


def crossing(points: Sequence[Point], level: float) -> Crossing:
    """Where the fit falls under ``level``. There must be a point."""
    kept, reached = _kept(points, level)
    without = [
        _kept([point for point in points if point.adapter_id != left_out], level)[0]
        for left_out in sorted({point.adapter_id for point in points})
    ]
    return Crossing(level, kept, min([kept, *without]), max([kept, *without]), reached)


def _kept(points: Sequence[Point], level: float) -> tuple[float, bool]:
    """The largest error that the fit holds at ``level`` (0 where it never does), and whether it falls after it."""
    fit = falling_fit(points)
    errors = [error for error, value in fit if value >= level]
    return max(errors, default=0.0), len(errors) < len(fit)
