"""Quality figures against hand cases and small references written here."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_jobs.quality.metrics import Figure, Relative, Score, figures, rouge_l, score
from compress_jobs.quality.scorer import Answers
from compress_jobs.quality.task import Task

TASK = Task("t", "{x}?", (("1", "one"), ("2", "two and a half"), ("3", "three"), ("4", "four")))
few = settings(derandomize=True, max_examples=60, deadline=None)


def longest_common(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


@pytest.mark.parametrize(
    ("expected", "text", "value"),
    [
        ("four hundred and fifty", " four hundred and fifty", 1.0),
        ("four hundred and fifty", " Four hundred fifty.", 2 * 1 * 0.75 / 1.75),  # precision 1, recall 3/4
        ("a b c d", "b a d c", 0.5),  # the order counts: two in order of four and four
        ("one", "", 0.0),
        ("Åland", "aland", 0.0),
        ("Йошкар-Ола", "йошкар ола", 1.0),  # any script
        ("dokuzyüz otuz", "dokuzyüz", 2 * 1 * 0.5 / 1.5),  # accents do not split words
    ],
)
def test_rouge_l_by_hand(expected: str, text: str, value: float) -> None:
    assert rouge_l([expected], [text]) == [pytest.approx(value)]


@few
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(a: list[str], b: list[str]) -> None:
    common = longest_common(a, b)
    value = 2 * common / (len(a) + len(b))  # the harmonic mean of common / |b| and common / |a|
    assert rouge_l([" ".join(a)], [" ".join(b)]) == [pytest.approx(value)]


def test_a_score_counts_rows() -> None:
    own = Answers(0.5, (True, False, True, False), (" one", " two", " three", " five"))
    other = Answers(0.7, (True, False, False, False), (" one", " two and", " three hundred", " five"))
    ours = score(TASK, own, own)
    assert ours == Score(0.5, 0.5, pytest.approx((1 + 2 / 5 + 1 + 0) / 4), 1.0)
    theirs = score(TASK, other, own)
    assert theirs == Score(0.7, 0.25, pytest.approx((1 + 4 / 6 + 2 / 3 + 0) / 4), 0.5)


def test_relative_figures_are_shares_of_what_the_uncompressed_adapter_can() -> None:
    base, uncompressed = Score(4.0, 0.0, 0.1, 0.0), Score(1.0, 0.8, 0.9, 1.0)
    relative = Relative.of(Score(1.3, 0.6, 0.45, 0.7), uncompressed, base)
    assert relative == Relative(pytest.approx(0.9), pytest.approx(0.75), pytest.approx(0.5), 0.7)
    assert Relative.of(uncompressed, uncompressed, base) == Relative(1.0, 1.0, 1.0, 1.0)
    assert Relative.of(base, uncompressed, base).loss == 0.0


def test_an_adapter_that_never_could_is_left_out() -> None:
    nothing = Score(4.0, 0.0, 0.0, 1.0)
    relative = Relative.of(Score(3.0, 0.5, 0.5, 0.0), nothing, Score(3.5, 0.0, 0.0, 0.0))
    assert relative == Relative(None, None, None, 0.0)
    found = figures([relative, Relative(0.5, 1.0, None, 1.0)])
    assert found["loss"] == Figure(0.5, 0.5, 0.0, 1)
    assert found["rouge_l"] is None
    assert found["agreement"] == Figure(0.5, 0.0, 0.5, 2)


def test_worst_is_the_largest_loss_and_the_least_of_the_others() -> None:
    found = figures([Score(1.0, 0.2, 0.3, 0.4), Score(3.0, 0.6, 0.9, 1.0)])
    assert found["loss"] == Figure(2.0, 3.0, 1.0, 2)
    assert found["exact_match"] is not None
    assert (found["exact_match"].worst, found["exact_match"].mean) == (0.2, pytest.approx(0.4))
    spread = Figure.of([1.0, 2.0, 4.0])
    assert spread is not None
    assert spread.spread == pytest.approx(math.sqrt(14 / 9))
