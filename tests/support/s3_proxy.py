"""A proxy in front of a real S3 server that provokes faults on the wire.

    with S3Proxy(server) as proxy:
        proxy.on_request = first(2, Action.SLOW_DOWN)          # the first two requests, then forward
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

The Host header goes on unchanged, because the signature covers it.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum, auto
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from infra.seaweed import S3Server


class Action(Enum):
    FORWARD = auto()
    SLOW_DOWN = auto()
    """Answer 503 SlowDown; the server sees nothing."""
    FORBIDDEN = auto()
    """Answer 403 AccessDenied; the server sees nothing."""
    EXPIRED = auto()
    """Answer 400 ExpiredToken, as AWS does to a session that has ended; the server sees nothing."""
    CONFLICT = auto()
    """Answer 409 ConditionalRequestConflict, as AWS does to racing conditional writes; the server sees nothing."""
    DROP = auto()
    """Close the connection; the server sees nothing."""
    FORWARD_THEN_DROP = auto()
    """The server does it, the client gets no answer."""
    TRUNCATE = auto()
    """All headers, half the body, then close."""
    SLOW = auto()
    """Forward after ``slow_s`` of the proxy."""
    STRIP_CONDITIONS = auto()
    """Forward without If-Match and If-None-Match, signed anew: a store that ignores them."""


OnRequest = Callable[[str, str, dict[str, str]], Action]
"""(method, path with query, headers in lower case) -> what to do. Called by one thread at a time; it may block."""

_ANSWERS = {
    Action.SLOW_DOWN: (503, "SlowDown"),
    Action.FORBIDDEN: (403, "AccessDenied"),
    Action.EXPIRED: (400, "ExpiredToken"),
    Action.CONFLICT: (409, "ConditionalRequestConflict"),
}


def always(action: Action) -> OnRequest:
    return lambda method, path, headers: action


def first(count: int, action: Action, method: str = "") -> OnRequest:
    """``action`` for the first ``count`` requests (of that method, where one is given), then FORWARD."""
    left = count

    def decide(seen: str, path: str, headers: dict[str, str]) -> Action:
        nonlocal left
        if left == 0 or method not in ("", seen):
            return Action.FORWARD
        left -= 1
        return action

    return decide


class S3Proxy:
    """``seen`` lists what came in: (method, path, action taken)."""

    def __init__(self, server: S3Server, on_request: OnRequest | None = None) -> None:
        self.server = server
        self.on_request: OnRequest = on_request or always(Action.FORWARD)
        self.seen: list[tuple[str, str, Action]] = []
        self.slow_s = 0.1
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> S3Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def decide(self, method: str, path: str, headers: dict[str, str]) -> Action:
        with self._lock:
            action = self.on_request(method, path, headers)
            self.seen.append((method, path, action))
        return action


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: S3Proxy

    def _handle(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        assert "chunked" not in headers.get("transfer-encoding", ""), "a body of unknown length is not handled here"
        body = self.rfile.read(int(headers.get("content-length", 0)))
        action = self.proxy.decide(self.command, self.path, headers)
        if action in _ANSWERS:
            status, code = _ANSWERS[action]
            text = f"<Error><Code>{code}</Code><Message>provoked by the proxy</Message></Error>".encode()
            self._answer(status, {"Content-Type": "application/xml"}, len(text), text)
            return
        if action is Action.DROP:
            self.close_connection = True
            return
        if action is Action.SLOW:
            time.sleep(self.proxy.slow_s)
        if action is Action.STRIP_CONDITIONS:
            headers = self._without_conditions(headers, body)
        status, answer_headers, answer = self._forward(headers, body)
        if action is Action.FORWARD_THEN_DROP:
            self.close_connection = True
            return
        length = int(answer_headers.get("Content-Length", len(answer)))
        if action is Action.TRUNCATE:
            self.close_connection = True
            answer = answer[: len(answer) // 2]
        self._answer(status, answer_headers, length, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _forward(self, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.proxy.server.endpoint).netloc, timeout=60)
        try:
            # The client's Expect: 100-continue was answered on this side.
            passed = {name: value for name, value in headers.items() if name not in ("expect", "connection")}
            connection.request(self.command, self.path, body or None, passed)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def _without_conditions(self, headers: dict[str, str], body: bytes) -> dict[str, str]:
        dropped = ("if-match", "if-none-match", "authorization", "x-amz-date", "x-amz-content-sha256")
        kept = {name: value for name, value in headers.items() if name not in (*dropped, "expect", "connection")}
        server = self.proxy.server
        request = AWSRequest(self.command, f"http://{headers['host']}{self.path}", headers=kept, data=body)
        S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", server.region).add_auth(request)
        return {name.lower(): value for name, value in request.headers.items()}

    def _answer(self, status: int, headers: dict[str, str], length: int, body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(BrokenPipeError, ConnectionResetError):  # who asked may have been killed, or tired of waiting
                self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet: the tests look at ``seen``."""
