"""A group at zero: who wants it is told apart from who asks. Over a real Serve: tests/clients/test_scaling.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from typing import Any

import pytest

from serve_app.openai.errors import ApiError
from serve_app.routing.zero import Zero

ASLEEP, WOKEN = "at zero; a request wakes it", "it is being woken"


class Call:
    """As Serve's response to one: awaited, and cancelled."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    def __await__(self) -> Generator[Any, None, None]:
        return self.answer.__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


def run(test: Callable[[Zero, list[Call]], Coroutine[Any, Any, None]], does: str = "wait") -> None:
    async def main() -> None:
        calls: list[Call] = []

        def call() -> Call:
            calls.append(Call())
            return calls[-1]

        await test(Zero("group-0", does, call), calls)

    asyncio.run(main())


def soon(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


async def look(zero: Zero) -> str:
    said = zero.be()
    await asyncio.sleep(0)
    return said


def test_nobody_who_only_looks_wakes_it_and_all_who_want_it_do_by_one_call() -> None:
    async def test(zero: Zero, calls: list[Call]) -> None:
        for _ in range(3):
            assert await look(zero) == ASLEEP
        assert zero.is_asleep
        assert not calls
        for _ in range(3):
            zero.want(soon(60))
            assert await look(zero) == WOKEN
        assert not zero.is_asleep
        [only] = calls
        waiting = asyncio.ensure_future(zero.end())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        zero.leave(alive=True)
        await waiting
        assert only.is_cancelled
        assert not zero.is_now
        assert zero.cold_start_s is not None
        assert 0.01 < zero.cold_start_s < 5
        assert await look(zero) == ASLEEP, "what was wanted is there no longer, and nobody has asked again"

    run(test)


def test_when_nobody_wants_it_any_more_the_call_ends() -> None:
    async def test(zero: Zero, calls: list[Call]) -> None:
        await look(zero)
        zero.want(soon(0.02))
        assert await look(zero) == WOKEN
        await asyncio.sleep(0.03)
        assert await look(zero) == ASLEEP
        await asyncio.sleep(0)
        assert calls[0].is_cancelled

    run(test)


def test_a_replica_that_answered_the_call_and_was_lost_is_called_for_again() -> None:
    async def test(zero: Zero, calls: list[Call]) -> None:
        await look(zero)
        zero.want(soon(60))
        await look(zero)
        calls[0].answer.set_result(None)
        await asyncio.sleep(0)
        await look(zero)
        assert len(calls) == 2

    run(test)


def test_where_requests_do_not_wait_they_are_told_what_it_took_the_last_time() -> None:
    async def test(zero: Zero, calls: list[Call]) -> None:
        for seconds in (30, 1):
            await look(zero)
            with pytest.raises(ApiError, match=f"is being woken; try again in {seconds} s") as caught:
                zero.want(soon(60))
            assert (caught.value.status, caught.value.retry_after_s) == (503, seconds)
            assert await look(zero) == WOKEN
            zero.leave(alive=True)
            zero.cold_start_s = 0.4

    run(test, "refuse")


def test_a_replica_that_cannot_serve_ends_the_waiting_and_no_time_is_taken() -> None:
    async def test(zero: Zero, calls: list[Call]) -> None:
        await look(zero)
        zero.want(soon(60))
        await look(zero)
        zero.leave(alive=False)
        await zero.end()
        await asyncio.sleep(0)
        assert zero.cold_start_s is None
        assert calls[0].is_cancelled

    run(test)
