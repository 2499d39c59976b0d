"""Many streams by one carrier: each piece arrives once, in order, in few messages, and no end is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from cluster.errors import HomeUnavailable
from serve_app.openai.call import Call, Carried, Message, Reply
from serve_app.replica import carrier
from serve_app.replica.carrier import Carriers
from serve_app.routing.carrying import Carrying, carried
from serve_app.routing.interruption import Interruption

ROUTER = "router-1"
HELLO: Message = [("", b"here")]


def call(number: int) -> Call:
    return Call("completions", b"{}", f"cmpl-{number}", "number-en", "sha256:0", 0, ROUTER)


class Steps:
    """An engine's, which every stream waits for."""

    def __init__(self) -> None:
        self.next: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def take(self) -> None:
        done, self.next = self.next, asyncio.get_running_loop().create_future()
        done.set_result(None)
        await asyncio.sleep(0.05)


async def words(number: int, count: int, steps: Steps | None = None) -> AsyncGenerator[Reply | bytes, None]:
    for word in range(count):
        if steps is not None:
            await asyncio.shield(steps.next)
        yield f"{number}.{word} ".encode()


def in_loop(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 20))  # type: ignore[arg-type]


async def receive(carriers: Carriers, into: list[Message]) -> None:
    """Without the first one, which is the replica's name."""
    said = carriers.carry(ROUTER)
    assert await anext(said) == HELLO
    async for message in said:
        into.append(message)


def test_without_a_carrier_a_stream_is_said_piece_by_piece() -> None:
    async def scene() -> None:
        said = [piece async for piece in Carriers("here").send(call(0), words(0, 3))]
        assert said == [b"0.0 ", b"0.1 ", b"0.2 "]

    in_loop(scene)


def test_what_is_there_at_one_step_is_one_message_and_every_stream_ends() -> None:
    async def scene() -> None:
        carriers, messages, steps = Carriers("here"), list[Message](), Steps()
        receiving = asyncio.create_task(receive(carriers, messages))
        await asyncio.sleep(0)

        async def stream(number: int) -> list[Any]:
            return [piece async for piece in carriers.send(call(number), words(number, 4, steps))]

        streams = [asyncio.create_task(stream(number)) for number in range(8)]
        await asyncio.sleep(0.01)
        for _ in range(4):
            await steps.take()
        assert [await own for own in streams] == [[Carried(f"{number}.0 ".encode(), "here")] for number in range(8)]
        await asyncio.sleep(0.05)
        receiving.cancel()
        # One a step; the first piece of each goes another way.
        assert len(messages) == 3
        for number in range(8):
            own = [piece for message in messages for name, piece in message if name == f"cmpl-{number}"]
            assert own == [*(f"{number}.{word} ".encode() for word in (1, 2, 3)), None]

    in_loop(scene)


def test_a_refusal_does_not_go_by_the_carrier() -> None:
    async def refused() -> AsyncGenerator[Reply | bytes, None]:
        yield Reply(400, b"{}")

    async def scene() -> None:
        carriers = Carriers("here")
        receiving = asyncio.create_task(receive(carriers, []))
        await asyncio.sleep(0)
        assert [piece async for piece in carriers.send(call(0), refused())] == [Reply(400, b"{}")]
        receiving.cancel()

    in_loop(scene)


def test_no_message_is_larger_than_serve_takes() -> None:
    async def large() -> AsyncGenerator[Reply | bytes, None]:
        for _ in range(40):
            yield bytes(300_000)

    async def scene() -> None:
        carriers, messages = Carriers("here"), list[Message]()
        receiving = asyncio.create_task(receive(carriers, messages))
        await asyncio.sleep(0)
        async for _ in carriers.send(call(0), large()):
            pass
        await asyncio.sleep(0.1)
        receiving.cancel()
        assert messages[-1][-1] == ("cmpl-0", None)
        sizes = [sum(len(piece) for _, piece in message if isinstance(piece, bytes)) for message in messages]
        assert sum(sizes) == 39 * 300_000
        assert max(sizes) < 2 << 20

    in_loop(scene)


def test_a_carrier_stays_while_it_is_in_use_and_goes_when_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "IDLE_S", 0.05)

    async def scene() -> None:
        carriers, steps = Carriers("here"), Steps()
        receiving = asyncio.create_task(receive(carriers, []))
        asyncio.get_running_loop().call_later(0.02, lambda: steps.next.set_result(None))
        await asyncio.sleep(0)
        stream = carriers.send(call(0), words(0, 2, steps))
        assert await anext(stream) == Carried(b"0.0 ", "here")
        steps.next = asyncio.get_running_loop().create_future()
        rest = asyncio.create_task(anext(stream, None))  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        assert not receiving.done()
        await steps.take()
        assert await rest is None
        await asyncio.wait_for(receiving, 1)
        # The next stream says its pieces itself, and another carrier may be opened.
        assert [piece async for piece in carriers.send(call(1), words(1, 1))] == [b"1.0 "]
        assert await anext(carriers.carry(ROUTER)) == HELLO

    in_loop(scene)


def test_a_second_carrier_for_the_same_router_ends_and_the_first_goes_on() -> None:
    async def scene() -> None:
        carriers, messages = Carriers("here"), list[Message]()
        receiving = asyncio.create_task(receive(carriers, messages))
        await asyncio.sleep(0)
        assert [message async for message in carriers.carry(ROUTER)] == [HELLO]
        assert [type(piece) async for piece in carriers.send(call(0), words(0, 2))] == [Carried]
        await asyncio.sleep(0.01)
        assert messages == [[("cmpl-0", b"0.1 "), ("cmpl-0", None)]]
        receiving.cancel()

    in_loop(scene)


def test_a_stream_whose_carrier_is_lost_says_so_itself() -> None:
    async def scene() -> None:
        carriers = Carriers("here")
        receiving = asyncio.create_task(receive(carriers, []))
        await asyncio.sleep(0)
        stream = carriers.send(call(0), words(0, 9))
        assert await anext(stream) == Carried(b"0.0 ", "here")
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        told = await anext(stream)
        assert isinstance(told, Reply)
        assert told.status == 503
        assert [piece async for piece in stream] == []

    in_loop(scene)


# The router's end.


class Response:
    """A replica's stream as Serve hands it over."""

    def __init__(self, pieces: AsyncGenerator[Any, None]) -> None:
        self.pieces, self.cancelled = pieces, False

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        return self.pieces

    async def __anext__(self) -> Any:
        return await anext(self.pieces)

    def cancel(self) -> None:
        self.cancelled = True


class Scene:
    """A group's carrying with one replica behind it."""

    def __init__(self) -> None:
        self.carriers = Carriers("here")
        opened = lambda: Response(self.carriers.carry(ROUTER))  # noqa: E731
        self.carrying = Carrying("group-0", opened, lambda: None, lambda replica: None)
        self.running = asyncio.create_task(self.carrying.run())

    async def ask(self, number: int, count: int) -> list[Reply | bytes]:
        response = self.carriers.send(call(number), words(number, count))
        deadline = asyncio.get_running_loop().time() + 10
        with Interruption(deadline) as interruption, self.carrying.expecting(f"cmpl-{number}") as queue:
            first = await anext(response)
            if not isinstance(first, Carried):
                self.carrying.want()
                return [first, *[piece async for piece in response]]  # type: ignore[list-item]
            return [first.piece, *[piece async for piece in carried(queue, response, interruption)]]


def test_the_router_opens_a_carrier_once_it_is_wanted_and_hands_each_stream_its_own() -> None:
    async def scene() -> None:
        side = Scene()
        assert b"".join(await side.ask(0, 5)) == b"0.0 0.1 0.2 0.3 0.4 "  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        answers = await asyncio.gather(*(side.ask(number, 5) for number in range(1, 30)))
        for number, pieces in enumerate(answers, start=1):
            assert b"".join(pieces) == "".join(f"{number}.{word} " for word in range(5)).encode()  # type: ignore[arg-type]
        assert len(await side.ask(99, 5)) == 2  # the first by its call, the rest at once

    in_loop(scene)


def test_a_carrier_that_breaks_is_told_once_and_its_call_is_cancelled() -> None:
    async def breaking() -> AsyncGenerator[Message, None]:
        yield HELLO
        yield [("cmpl-7", b"7.1 "), ("cmpl-8", b"of one that was given up")]
        raise ConnectionError

    async def scene() -> None:
        response, lost = Response(breaking()), asyncio.Queue[str]()
        carrying = Carrying("group-0", lambda: response, lambda: None, lost.put_nowait)
        running = asyncio.create_task(carrying.run())
        with carrying.expecting("cmpl-7") as queue:
            carrying.want()
            assert await queue.get() == b"7.1 "
            assert await lost.get() == "here"
        await asyncio.sleep(0)
        assert response.cancelled
        running.cancel()

    in_loop(scene)


def test_one_that_does_not_open_costs_no_stream_anything_and_is_tried_again() -> None:
    async def failing() -> AsyncGenerator[Message, None]:
        raise ConnectionError
        yield HELLO

    async def scene() -> None:
        tried, lost = list[Response](), list[str]()

        def opened() -> Response:
            tried.append(Response(failing()))
            if len(tried) == 2:
                raise RuntimeError("no such deployment")
            return tried[-1]

        carrying = Carrying("group-0", opened, lambda: None, lost.append)
        running = asyncio.create_task(carrying.run())
        for _ in range(3):
            carrying.want()
            await asyncio.sleep(0.01)
        assert (len(tried), lost) == (3, [])
        running.cancel()

    in_loop(scene)


def test_an_answer_whose_end_is_lost_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.routing.carrying.GRACE_S", 0.05)

    async def scene() -> None:
        async def ended() -> AsyncGenerator[Any, None]:
            return
            yield

        queue: asyncio.Queue[Any] = asyncio.Queue()
        queue.put_nowait(b"7.1 ")
        with Interruption(asyncio.get_running_loop().time() + 60) as interruption:
            pieces = carried(queue, ended(), interruption)
            assert await anext(pieces) == b"7.1 "
            with pytest.raises(HomeUnavailable, match="end of the answer"):
                await anext(pieces)

    in_loop(scene)


def test_a_piece_that_is_larger_than_a_message_comes_in_parts_by_either_way() -> None:
    async def one() -> AsyncGenerator[Reply | bytes, None]:
        yield bytes(5_000_000)
        yield bytes(5_000_000)

    async def scene() -> None:
        direct = [len(piece) async for piece in Carriers("here").send(call(0), one())]  # type: ignore[arg-type]
        assert (max(direct), sum(direct)) == (1 << 20, 10_000_000)
        carriers, messages = Carriers("here"), list[Message]()
        receiving = asyncio.create_task(receive(carriers, messages))
        await asyncio.sleep(0)
        first = [piece async for piece in carriers.send(call(1), one())]
        await asyncio.sleep(0.1)
        receiving.cancel()
        sizes = [sum(len(piece) for _, piece in message if isinstance(piece, bytes)) for message in messages]
        assert max(sizes) <= 2 << 20
        assert sum(sizes) + len(first[0].piece) == 10_000_000  # type: ignore[union-attr]

    in_loop(scene)


def test_what_is_said_as_the_idle_time_runs_out_is_still_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "IDLE_S", 0.02)

    async def scene() -> None:
        for _ in range(20):
            carriers, messages = Carriers("here"), list[Message]()
            receiving = asyncio.create_task(receive(carriers, messages))
            await asyncio.sleep(0)
            stream = carriers.send(call(0), words(0, 2))
            assert await anext(stream) == Carried(b"0.0 ", "here")
            time.sleep(0.03)  # noqa: ASYNC251  # the timer fires in the turn in which the end is said
            assert [piece async for piece in stream] == []
            await asyncio.wait_for(receiving, 5)
            assert [piece for message in messages for _, piece in message] == [b"0.1 ", None]

    in_loop(scene)
