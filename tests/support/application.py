"""A deployed application as a client sees it: by openai's client, and by plain requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import openai

from tests.support.serving import ENGINE
from tests.support.serving import PATIENCE_S as START_PATIENCE_S

PATIENCE_S = 60.0 if ENGINE == "transformers" else START_PATIENCE_S


@dataclass(frozen=True)
class App:
    """One deployed application; ``prefix`` is its route's."""

    port: int
    name: str = "compress-then-serve"
    prefix: str = ""

    @property
    def client(self) -> openai.OpenAI:
        url = f"http://127.0.0.1:{self.port}{self.prefix}/v1"
        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """A plain request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, self.prefix + path, body, headers or {})
            yield connection.getresponse()

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], Any]:
        """Status, headers (lower case) and body of it."""
        with self.open(method, path, body=body) as answer:
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, headers, json.loads(answer.read())

    def say(self, model: str, prompt: Any = "The answer is", **fields: Any) -> openai.types.Completion:
        return self.client.completions.create(
            model=model, prompt=prompt, **{"temperature": 0, "max_tokens": 6} | fields
        )

    def group(self, name: str) -> dict[str, Any]:
        group: dict[str, Any] = self.call("GET", "/ready")[2]["groups"][name]
        return group

    @contextlib.contextmanager
    def long_stream(self, model: str) -> Iterator[socket.socket]:
        """A streamed request that has begun to answer and has very many tokens to go."""
        fields = {"model": model, "prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True}
        with contextlib.closing(self.send(fields)) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
            yield connection

    def send(self, fields: dict[str, Any]) -> socket.socket:
        body = json.dumps(fields).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        head = f"POST {self.prefix}/v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection


def wait_until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
