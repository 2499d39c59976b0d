"""A wait that is ended from outside: at its deadline, by a reason, or by who waits; never two of them mixed up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cluster.errors import HomeUnavailable
from serve_app.routing.interruption import Interruption

FAR = 60.0


def in_loop(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 10))  # type: ignore[arg-type]


def interruption(after_s: float = FAR) -> Interruption:
    return Interruption(asyncio.get_running_loop().time() + after_s)


def test_what_is_there_in_time_is_handed_on() -> None:
    async def scene() -> None:
        with interruption() as call:
            assert await call.wait(asyncio.sleep(0.01, "there")) == "there"
            with pytest.raises(ValueError, match="its own"):
                await call.wait(failing())

    in_loop(scene)


async def failing() -> None:
    raise ValueError("its own")


def test_a_deadline_ends_every_wait_from_then_on() -> None:
    async def scene() -> None:
        with interruption(0.05) as call:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    await call.wait(asyncio.sleep(FAR))
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    in_loop(scene)


def test_a_reason_ends_the_wait_at_once_and_the_first_one_counts() -> None:
    async def scene() -> None:
        with interruption() as call:
            asyncio.get_running_loop().call_later(0.01, call.end, HomeUnavailable("lost"))
            asyncio.get_running_loop().call_later(0.01, call.end, HomeUnavailable("later"))
            with pytest.raises(HomeUnavailable, match="lost"):
                await call.wait(asyncio.sleep(FAR))

    in_loop(scene)


def test_a_reason_between_two_waits_is_raised_by_the_next() -> None:
    async def scene() -> None:
        with interruption() as call:
            await call.wait(asyncio.sleep(0))
            call.end(HomeUnavailable("lost"))
            await asyncio.sleep(0)  # whoever waits for something else is left alone
            with pytest.raises(HomeUnavailable, match="lost"):
                await call.wait(asyncio.sleep(FAR))

    in_loop(scene)


def test_a_reason_that_is_there_is_raised_though_the_part_would_be_ready_and_nothing_else_is_cancelled() -> None:
    async def scene() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue()
        queue.put_nowait(1)
        with interruption() as call:
            call.end(HomeUnavailable("lost"))
            with pytest.raises(HomeUnavailable, match="lost"):
                await call.wait(queue.get())
            await asyncio.sleep(0.01)
        assert queue.qsize() == 1

    in_loop(scene)


@pytest.mark.parametrize("too", [False, True], ids=["alone", "with a reason at the same time"])
def test_who_is_cancelled_from_outside_stays_cancelled(too: bool) -> None:
    async def scene() -> None:
        with interruption() as call:
            task = asyncio.ensure_future(call.wait(asyncio.sleep(FAR)))
            await asyncio.sleep(0.01)
            if too:
                call.end(HomeUnavailable("lost"))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    in_loop(scene)


def test_the_part_that_is_given_up_is_cancelled() -> None:
    ended = []

    async def part() -> None:
        try:
            await asyncio.sleep(FAR)
        finally:
            ended.append(True)

    async def scene() -> None:
        with interruption(0.02) as call:
            with pytest.raises(TimeoutError):
                await call.wait(part())
            assert ended == [True]

    in_loop(scene)
