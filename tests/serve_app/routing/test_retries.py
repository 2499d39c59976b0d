"""How many requests may be asked again."""

from __future__ import annotations

import pytest

from serve_app.routing.retries import RetryBudget


def test_a_tenth_of_the_last_seconds_requests_and_three_at_least_are_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("serve_app.routing.retries.time.monotonic", lambda: now)
    budget = RetryBudget()
    assert [budget.take() for _ in range(5)] == [True] * 3 + [False] * 2
    for _ in range(60):
        budget.count()
    assert [budget.take() for _ in range(5)] == [True] * 3 + [False] * 2
    now += 10.5
    assert [budget.take() for _ in range(5)] == [True] * 3 + [False] * 2
