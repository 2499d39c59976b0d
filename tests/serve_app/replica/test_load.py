"""What a replica says of its load."""

from __future__ import annotations

import pytest

from serve_app.replica.load import LoadMeter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_load_is_the_mean_since_it_was_last_asked() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    with meter.counting(4):
        clock.now += 2
        with meter.counting(1):
            clock.now += 1
    clock.now += 5
    assert meter.take() == pytest.approx((4 * 3 + 1) / 8)
    clock.now += 6
    assert meter.take() == 0


def test_what_is_still_there_counts_in_each_part() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    with meter.counting(3):
        clock.now += 6
        assert meter.take() == 3
        assert meter.take() == 3, "no time has passed"
        clock.now += 3
    clock.now += 3
    assert meter.take() == pytest.approx(1.5)


def test_a_request_that_fails_is_no_longer_counted() -> None:
    clock = Clock()
    meter = LoadMeter(clock)
    with pytest.raises(ValueError), meter.counting(3):
        raise ValueError
    clock.now += 1
    assert meter.take() == 0
