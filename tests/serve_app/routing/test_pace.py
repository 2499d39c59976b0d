"""When there is room again, as a 429 tells it."""

from __future__ import annotations

from serve_app.routing.pace import MOST_S, NUM_LAST, Pace


def test_the_wait_is_what_the_queue_takes_at_the_rate_at_which_sequences_end() -> None:
    own, rate, num_inflight = Pace(), 4.0, 48
    for _ in range(NUM_LAST):
        own.end(2, num_inflight / rate)  # as long as it takes where so many are always in flight
    for num_ahead in (1, 4, 5, 40):
        assert own.wait_s(num_ahead, num_inflight) == -(-num_ahead // int(rate))


def test_the_last_requests_count_and_each_by_its_sequences() -> None:
    own = Pace()
    for _ in range(10 * NUM_LAST):
        own.end(1, 600.0)
    for _ in range(NUM_LAST):
        own.end(3, 8.0)
        own.end(1, 4.0)
    assert own.wait_s(5, 5) == 7


def test_it_is_one_second_at_least_and_a_minute_at_most() -> None:
    own = Pace()
    assert own.wait_s(5, 5) == 1
    own.end(1, 300.0)
    assert (own.wait_s(0, 5), own.wait_s(5, 5), own.wait_s(1, 0)) == (1, MOST_S, 1)
