"""A replica's bytes as HTTP's: statuses, what is said while a stream waits, and that everything is closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from cluster.errors import HomeUnavailable
from serve_app.openai.call import Reply
from serve_app.routing.responses import as_events

HEADERS = {"X-Served-Revision": "sha256:0"}
KEEP_ALIVE_S = 0.05
DONE = b"data: [DONE]\n\n"


class Pieces:
    """``script``: what is said, errors raised, and numbers waited for, in seconds."""

    def __init__(self, *script: Any) -> None:
        self.script, self.closed = script, False

    async def __call__(self) -> AsyncGenerator[Reply | bytes, None]:
        try:
            for step in self.script:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed = True


async def sent(pieces: Pieces, leave_after_s: float = 60.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body as a client that leaves then gets them."""
    response = await as_events(pieces(), HEADERS, KEEP_ALIVE_S)
    messages: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(leave_after_s)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        messages.append(message)

    await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    head, *bodies = messages
    headers = {name.decode(): value.decode() for name, value in head["headers"]}
    return head["status"], headers, b"".join(message.get("body", b"") for message in bodies)


def get(pieces: Pieces, **options: Any) -> tuple[int, dict[str, str], bytes]:
    return asyncio.run(sent(pieces, **options))


def test_a_stream_that_begins_at_once_holds_nothing_but_its_events_and_is_not_to_be_buffered() -> None:
    pieces = Pieces(b"data: 1\n\n", b"data: 2\n\n", DONE)
    status, headers, body = get(pieces)
    assert (status, body) == (200, b"data: 1\n\ndata: 2\n\n" + DONE)
    assert headers["x-served-revision"] == "sha256:0"
    assert headers["x-accel-buffering"] == "no"
    assert pieces.closed


def test_comments_come_while_a_stream_waits_for_its_first_token_and_not_after_it() -> None:
    status, _, body = get(Pieces(4.5 * KEEP_ALIVE_S, b"data: 1\n\n", 3 * KEEP_ALIVE_S, DONE))
    assert status == 200
    *comments, first, done, rest = body.split(b"\n\n")
    assert 2 <= len(comments) <= 5
    assert set(comments) == {b": waiting for the first token"}
    assert (first, done, rest) == (b"data: 1", b"data: [DONE]", b"")


def test_a_refusal_keeps_its_status_and_tells_nobody_as_who_answered() -> None:
    body = json.dumps({"error": {"message": "full"}}).encode()
    for status, retry in ((400, None), (503, "1")):
        pieces = Pieces(Reply(status, body))
        seen, headers, told = get(pieces)
        assert (seen, told, headers.get("retry-after")) == (status, body, retry)
        assert "x-served-revision" not in headers
        assert pieces.closed


def test_what_fails_after_the_status_is_an_error_event_and_the_end() -> None:
    refusal = Reply(503, b'{"error": {"message": "late"}}')
    for pieces, message in (
        (Pieces(b"data: 1\n\n", HomeUnavailable("group-0 is lost")), "group-0 is lost"),
        (Pieces(3 * KEEP_ALIVE_S, HomeUnavailable("group-0 is lost")), "group-0 is lost"),
        (Pieces(3 * KEEP_ALIVE_S, refusal), "late"),
    ):
        status, _, body = get(pieces)
        assert status == 200
        last = body.split(b"\n\n")[-2]
        assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == message
        assert DONE not in body
        assert pieces.closed


def test_a_client_that_leaves_closes_its_stream_whether_it_has_begun_or_waits() -> None:
    for pieces in (Pieces(b"data: 1\n\n", 60.0), Pieces(60.0)):
        get(pieces, leave_after_s=3 * KEEP_ALIVE_S)
        assert pieces.closed
