"""The curve of relative performance against error: the monotone fit by brute force, crossings by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jobs.quality.gate_curve import Point, bins, crossing, falling_fit

few = settings(derandomize=True, max_examples=30, deadline=None)


def best_falling(values: list[float]) -> list[float]:
    """The least-squares non-increasing sequence, by trying every way of cutting into blocks of equal level."""
    best, best_loss = values, np.inf
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        blocks = np.split(np.array(values), [i + 1 for i, cut in enumerate(cuts) if cut])
        levels = [block.mean() for block in blocks]
        if any(later > earlier + 1e-12 for earlier, later in itertools.pairwise(levels)):
            continue
        fitted = [float(level) for level, block in zip(levels, blocks, strict=True) for _ in block]
        loss = float(np.square(np.array(fitted) - values).sum())
        if loss < best_loss - 1e-12:
            best, best_loss = fitted, loss
    return best


@few
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_the_fit_is_the_best_non_increasing_one(values: list[int]) -> None:
    points = [Point("a", float(i), float(value)) for i, value in enumerate(values)]
    fit = falling_fit(points[::-1])
    found = [next(level for error, level in fit if point.error <= error) for point in points]
    np.testing.assert_allclose(found, best_falling([float(value) for value in values]))


def test_points_of_equal_error_count_as_one_place() -> None:
    fit = falling_fit([Point("a", 0.5, 1.0), Point("b", 0.5, 0.0), Point("c", 0.7, 0.4)])
    assert fit == [(0.5, 0.5), (0.7, 0.4)]


def test_a_crossing_is_where_the_fit_falls_under_the_level() -> None:
    points = [Point(f"a{i}", error, 1.0 if error < 0.4 else 0.5) for i, error in enumerate((0.1, 0.2, 0.3, 0.5, 0.6))]
    found = crossing(points, 0.99)
    assert found.error == 0.3
    assert found.reached
    assert (found.lowest, found.highest) == (0.2, 0.3)  # without the adapter at 0.3 nothing is seen beyond 0.2
    assert crossing(points, 0.4).error == 0.6
    assert not crossing(points, 0.4).reached
    assert crossing([Point("a", 0.1, 0.2)], 0.9).error == 0.0


def test_noise_at_a_small_error_does_not_set_the_gate() -> None:
    points = [Point("noisy", 0.01, 0.9), Point("b", 0.1, 1.05), Point("c", 0.2, 1.05), Point("d", 0.5, 0.3)]
    assert crossing(points, 0.99).error == 0.2


def test_every_point_is_in_one_bin() -> None:
    errors = [0.0, 0.01, 0.011, 0.3, 0.6, 0.95, 1.0, 1.2]
    found = bins([Point("a", error, error) for error in errors])
    assert sum(b.num_points for b in found) == len(errors)
    assert (found[0].low, found[0].high, found[0].num_points) == (0.0, 0.01, 2)
    last = found[-1]
    assert (last.low, last.high, last.num_points) == (0.8, 1.0, 3)
    assert last.mean == pytest.approx((0.95 + 1.0 + 1.2) / 3)
    assert last.worst == 0.95
