"""Which gate follows from what the adapters keep: cases whose answer is known by hand."""

from __future__ import annotations

import math

import pytest

from compress_jobs.quality.gate_choice import BASIS, LEVELS, Judged, Level, Served, choose_gate


def adapter(name: str, *kept_at: tuple[float, float], basis: tuple[float, float] | None = None) -> Judged:
    """``kept_at``: (error, kept) of its truncations, errors descending; ``basis``: of its form on a basis."""
    cuts = [Served(f"rank {rank}", error, kept) for rank, (error, kept) in enumerate(kept_at, 1)]
    ways = [*cuts, Served("whole", 0.0, 1.0), *([Served(BASIS, *basis)] if basis else [])]
    by_level = [
        len(ways) - 1 if basis and basis[0] <= gate else next(i for i, way in enumerate(ways) if way.error <= gate)
        for gate in LEVELS
    ]
    return Judged(name, tuple(ways), tuple(by_level))


def chosen(judged: list[Judged], errors: list[float], keep: float) -> Level:
    """All adapters are judged: there is no doubt about their mean."""
    return choose_gate(judged, errors, keep, len(judged))[0]


FALLING = ((0.75, 0.6), (0.55, 0.9), (0.35, 0.98), (0.18, 0.992), (0.04, 0.999))


@pytest.mark.parametrize(("keep", "gate"), [(0.5, 0.8), (0.9, 0.6), (0.98, 0.4), (0.99, 0.2), (0.999, 0.05)])
def test_it_is_the_largest_that_keeps_what_is_asked_for(keep: float, gate: float) -> None:
    assert chosen([adapter("a", *FALLING)], [], keep).gate == gate


def test_where_none_keeps_it_the_smallest_is_taken() -> None:
    assert chosen([adapter("a", *FALLING, (0.015, 0.9991))], [], 0.9999).gate == LEVELS[0]


def test_a_basis_that_keeps_enough_is_worth_a_large_gate_though_a_cut_of_that_error_would_not() -> None:
    level = chosen([adapter("a", *FALLING, basis=(0.64, 0.995))], [0.64], 0.99)
    assert (level.gate, level.on_basis) == (0.7, 1)


def test_nobody_may_lose_more_than_five_times_what_all_may_in_the_mean() -> None:
    """Nine of ten keep all, so that the mean is 0.994; but the tenth keeps 0.94 alone."""
    easy = [adapter(f"easy-{i}", (0.5, 1.0)) for i in range(9)]
    assert chosen([*easy, adapter("hard", (0.5, 0.94), (0.1, 0.96))], [], 0.99).gate == 0.1
    assert chosen([*easy, adapter("hard", (0.5, 0.96), (0.1, 0.96))], [], 0.99).gate == 0.5


def test_what_is_kept_beyond_all_does_not_make_up_for_another() -> None:
    better, worse = adapter("better", (0.5, 1.1)), adapter("worse", (0.5, 0.97), (0.1, 1.0))
    level, found = choose_gate([better, worse], [], 0.99, 2)
    assert level.gate == 0.1
    assert next(one for one in found if one.gate == 0.5).kept == pytest.approx(0.985)


def test_a_sample_must_bear_out_all_by_two_standard_errors() -> None:
    """Kept 0.991 by the four judged, 0.98 to 1: enough where they are all there are, too uncertain for a hundred."""
    judged = [adapter(f"a{i}", (0.5, kept), (0.1, 1.0)) for i, kept in enumerate((0.98, 0.99, 0.995, 0.999))]
    assert choose_gate(judged, [], 0.99, 4)[0].gate == 0.5
    level, found = choose_gate(judged, [], 0.99, 100)
    assert level.gate == 0.1
    error = math.sqrt(sum((kept - 0.991) ** 2 for kept in (0.98, 0.99, 0.995, 0.999)) / 3 / 4 * (1 - 4 / 100))
    assert next(one for one in found if one.gate == 0.5).at_least == pytest.approx(0.991 - 2 * error)
    assert choose_gate(judged[3:], [], 0.99, 100)[0].gate == 0.5, "one alone may be as far off as it is from all"
    assert choose_gate(judged[1:2], [], 0.99, 100)[0].gate == 0.1


def test_no_gate_is_larger_than_the_errors_that_were_seen() -> None:
    """All are on bases at 0.05, where 0.8 would serve them just the same: but not whoever is added later."""
    on_bases = [adapter("a", *FALLING, basis=(0.03, 1.0)), adapter("b", *FALLING, basis=(0.04, 1.0))]
    assert chosen(on_bases, [0.03, 0.04, 0.045], 0.99).gate == 0.05
    assert chosen(on_bases, [0.03, 0.04, 0.06], 0.99).gate == 0.1
