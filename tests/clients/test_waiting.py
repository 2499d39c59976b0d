"""What clients see of a group that is asked for more than it does at once: nobody waits without a word."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import write_bundle
from tests.support.serving import ENGINE, PATIENCE_S, ray_with_serve

pytestmark = pytest.mark.slow

BATCH, INFLIGHT, TIMEOUT_S, KEEP_ALIVE_S = 2, 16, 12.0, 1.0
ENDLESS = {"model": "roman", "prompt": "x", "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Iterator[App]:
    out = tmp_path_factory.mktemp("waiting") / "out"
    write_bundle(out, base_path, {"0": {"roman": zoo_path / "roman"}}, {})
    limits = {"max_batch": BATCH, "max_inflight": INFLIGHT, "max_prompts": BATCH, "request_timeout_s": TIMEOUT_S}
    args = {"bundle": str(out), "base": str(base_path), "engine": ENGINE, "limits": limits}
    with ray_with_serve() as port:
        serve.run(build(args | {"http": {"sse_keep_alive_s": KEEP_ALIVE_S}}), name="waiting")
        app = App(port, "waiting")
        wait_until(lambda: app.call("GET", "/ready?all=1")[0] == 200, PATIENCE_S)
        yield app


@pytest.fixture(autouse=True)
def idle(app: App) -> None:
    wait_until(lambda: app.group("group-0")["num_inflight"] == 0)


def complete(app: App, **fields: Any) -> tuple[int, dict[str, str], Any]:
    return app.call("POST", "/v1/completions", json.dumps(ENDLESS | fields).encode())


@contextlib.contextmanager
def full_batch(app: App) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for _ in range(BATCH):
            stack.enter_context(app.long_stream("roman"))
        wait_until(lambda: app.group("group-0")["num_running"] == BATCH)
        yield


def silences(stream: socket.socket, enough: bytes) -> tuple[list[float], bytes]:
    """How long nothing came, each time, and all that came, up to ``enough``."""
    gaps, said, last = [], b"", time.monotonic()
    while enough not in said and (piece := stream.recv(1 << 16)):
        said, now = said + piece, time.monotonic()
        gaps.append(now - last)
        last = now
    return gaps, said


def test_streams_that_wait_for_their_turn_have_a_status_and_a_sign_of_life_all_along(app: App) -> None:
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(8) as pool:
        with full_batch(app):
            waiting = [
                stack.enter_context(contextlib.closing(app.send(ENDLESS | {"stream": True, "max_tokens": 4})))
                for _ in range(8)
            ]
            told = [pool.submit(silences, stream, b"[DONE]") for stream in waiting]
            time.sleep(4 * KEEP_ALIVE_S)
            assert not any(one.done() for one in told)
        for one in told:
            gaps, said = one.result()
            assert said.startswith(b"HTTP/1.1 200")
            assert said.count(b": waiting for the first token") >= 3
            assert said.count(b"data: {") == 4
            assert max(gaps) < 2.5 * KEEP_ALIVE_S


@pytest.mark.by_hand
def test_requests_whose_time_went_by_in_the_queue_are_not_told_to_ask_for_fewer_tokens(app: App) -> None:
    queued = "sequences are waiting for their turn in group-0"
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(INFLIGHT) as pool:
        streams = [
            stack.enter_context(contextlib.closing(app.send(ENDLESS | {"stream": True}))) for _ in range(INFLIGHT)
        ]
        told = [said.decode() for _, said in pool.map(lambda stream: silences(stream, b'"error"'), streams)]
    waited = [said for said in told if "had not begun" in said]
    assert len(waited) >= INFLIGHT - 2 * BATCH  # as time ran out for some, others had their turn
    assert all(queued in said and "fewer" not in said for said in waited)
    begun = [said for said in told if "was not finished" in said]
    assert len(begun) == INFLIGHT - len(waited)
    assert all('request_timeout_s; ask for fewer tokens"' in said for said in begun)
    # Of an answer that is one message nobody knows how long it waited.
    with ThreadPoolExecutor(INFLIGHT) as pool:
        for status, _, body in pool.map(lambda _: complete(app), range(INFLIGHT)):
            assert (status, body["error"]["code"]) == (504, "timeout")
            assert "; ask for fewer tokens, or try again later: " in body["error"]["message"]
            assert body["error"]["message"].endswith(queued)


@pytest.mark.by_hand
def test_retry_after_is_how_long_the_queue_takes(app: App) -> None:
    """Told by 429s under a load of so many clients as are let in; the reference is how fast their requests end."""

    def told_under(max_tokens: int) -> tuple[list[int], float]:
        ended: list[float] = []
        told: list[int] = []
        is_over = threading.Event()

        def run() -> None:
            while not is_over.is_set():
                if complete(app, max_tokens=max_tokens)[0] == 429:
                    time.sleep(0.1)  # who asks for the time had its place
                else:
                    ended.append(time.monotonic())

        with ThreadPoolExecutor(INFLIGHT) as pool:
            done = [pool.submit(run) for _ in range(INFLIGHT)]
            try:
                wait_until(lambda: len(ended) >= 3 * INFLIGHT, PATIENCE_S)
                while len(told) < 5:
                    status, headers, body = complete(app, max_tokens=1)
                    if status == 429:
                        told.append(int(headers["retry-after"]))
                        assert f"try again in {told[-1]} s" in body["error"]["message"]
                    time.sleep(0.2)
                last = ended[-2 * INFLIGHT :]
            finally:
                is_over.set()
            for one in done:
                one.result()
        return told, len(last) / (last[-1] - last[0])

    for max_tokens in (2, 16):
        told, rate = told_under(max_tokens)
        expected = (INFLIGHT - BATCH) / rate
        print(f"{max_tokens} tokens: told {told}, expected {expected:.1f}")
        assert all(expected / 3 <= seconds <= 3 * expected + 1 for seconds in told), (told, expected)


def test_far_too_many_at_once_are_answered_or_told_429_and_nothing_else(app: App) -> None:
    with ThreadPoolExecutor(96) as pool:
        told = list(pool.map(lambda number: complete(app, max_tokens=1 + number % 3), range(288)))
    statuses = [status for status, _, _ in told]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= INFLIGHT
    assert all(1 <= int(headers["retry-after"]) <= 60 for status, headers, _ in told if status == 429)
    assert all(body["usage"]["completion_tokens"] for status, _, body in told if status == 200)


def test_clients_that_leave_have_their_rows_freed_at_once(app: App) -> None:
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(contextlib.closing(app.send(ENDLESS | {"stream": True}))) for _ in range(INFLIGHT)
        ]
        wait_until(lambda: app.group("group-0")["num_waiting"] == INFLIGHT - BATCH)
        assert all(re.match(rb"HTTP/1.1 200", stream.recv(12)) for stream in streams)
    # What is told is a second old at most; one that runs to its end takes twenty times as long.
    wait_until(
        lambda: not any(app.group("group-0")[own] for own in ("num_inflight", "num_running", "num_waiting")), 3.0
    )
    assert complete(app, max_tokens=1)[0] == 200
