"""The application behind Serve's HAProxy, as in production: what a client gets is what it gets without."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml

from cluster.bundle.revisions import object_key
from tests.support.bundles import flip_a_byte, write_bundle
from tests.support.paths import REPOSITORY
from tests.support.processes import running
from tests.support.ray_heads import free_port

pytestmark = pytest.mark.slow

PATIENCE_S = 90.0
ROUTER = "ray::ServeReplica:compress-then-serve:router"


@dataclass(frozen=True)
class App:
    """``process`` is `serve run`'s, and all of Ray's are below it."""

    port: int
    process: subprocess.Popen[bytes]
    ports: dict[str, int]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    def call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, json.load(answer)

    def complete(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        return self.call("POST", "/v1/completions", json.dumps(fields).encode())

    def named(self, name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found


def wait_until(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("haproxy")
    clusters = {"0": {"roman": zoo_path / "roman"}, "1": {"number-en": zoo_path / "number-en"}}
    manifest = write_bundle(folder / "out", base_path, clusters, {"broken": zoo_path / "date-us"})
    flip_a_byte(folder / "out" / object_key(str(manifest.adapters["broken"].factors)))
    document = yaml.safe_load((REPOSITORY / "infra" / "serve.yaml").read_text())
    ports = {"stats": free_port(), "metrics": free_port()}
    document["http_options"]["port"] = port = free_port()
    document["applications"][0]["args"] |= {"bundle": str(folder / "out"), "base": str(base_path), "routers": 2}
    document["applications"][0]["args"]["engine"] = "transformers"
    document["applications"][0]["args"]["placement"]["clusters_per_group"] = 4
    (folder / "serve.yaml").write_text(yaml.safe_dump(document))
    settings = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Two on one machine would have the same ports otherwise.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["stats"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["metrics"]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")
    with running(*command, **settings) as process:
        app = App(port, process, ports)

        def is_ready() -> bool:
            assert process.poll() is None, "serve run ended"
            with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
                return app.call("GET", "/ready")[0] == 200
            return False

        wait_until(is_ready)
        yield app


def test_whole_and_streamed_answers_are_the_same_and_name_who_answered(app: App) -> None:
    fields: dict[str, Any] = {"model": "number-en", "prompt": "Q: 450 in English words?\nA:", "max_tokens": 24}
    fields |= {"temperature": 0, "stop": "\n"}
    whole = app.client.completions.with_raw_response.create(**fields)
    assert whole.headers["x-cluster"] == "1"
    assert whole.headers["x-served-revision"].startswith("sha256:")
    text = whole.parse().choices[0].text
    assert text.strip() == "four hundred and fifty"
    for _ in range(3):
        pieces = list(app.client.completions.create(**fields, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == text
        assert pieces[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("method", "path", "fields", "status", "code"),
    [
        ("POST", "/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"model": "roman", "prompt": "x", "stream": True, "tmp": 1}, 400, "unknown_field"),
        ("POST", "/v1/completions", {"model": "roman", "prompt": "x" * (3 << 20)}, 413, "body_too_large"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
        ("GET", "/v1/nothing", {}, 404, "unknown_url"),
    ],
)
def test_errors_keep_their_status_and_shape(
    app: App, method: str, path: str, fields: dict[str, Any], status: int, code: str
) -> None:
    seen, _, body = app.call(method, path, json.dumps(fields).encode() if fields else None)
    assert (seen, body["error"]["code"]) == (status, code)


def test_one_bad_adapters_503s_take_no_router_out_of_service(app: App) -> None:
    for _ in range(20):
        status, headers, body = app.complete(model="broken", prompt="x")
        assert status == 503
        assert "sha256" in body["error"]["message"]
        assert headers["retry-after"]
        assert app.complete(model="roman", prompt="Q:", max_tokens=1)[0] == 200


def test_a_client_that_leaves_frees_its_row(app: App) -> None:
    def running_rows() -> int:
        return int(app.call("GET", "/ready")[2]["groups"]["group-0"]["num_running"])

    body = {"model": "roman", "prompt": "x", "max_tokens": 1900, "stream": True, "ignore_eos": True}
    text = json.dumps(body).encode()
    for _ in range(2):
        with contextlib.closing(socket.create_connection(("127.0.0.1", app.port), timeout=60)) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
            connection.sendall(head.encode() + text)
            assert connection.recv(12) == b"HTTP/1.1 200"
            wait_until(lambda: running_rows() == 1)
        wait_until(lambda: running_rows() == 0)


def test_it_listens_where_the_readme_says(app: App) -> None:
    listening: set[tuple[str, int]] = set()
    for process in app.named("/haproxy -"):
        own = process.net_connections("inet")
        listening |= {(c.laddr.ip, c.laddr.port) for c in own if c.status == psutil.CONN_LISTEN}
    everywhere = {(ip, number) for ip in ("0.0.0.0", "::") for number in app.ports.values()}
    assert ("127.0.0.1", app.port) in listening
    assert {number for ip, number in listening & everywhere} == set(app.ports.values())
    assert listening - everywhere == {("127.0.0.1", app.port)}


def test_a_killed_router_takes_its_own_requests_along_and_no_others(app: App) -> None:
    wait_until(lambda: len(app.named(ROUTER)) == 2)
    os.kill(app.named(ROUTER)[0].pid, signal.SIGKILL)
    statuses = [app.complete(model="roman", prompt="Q:", max_tokens=1)[0] for _ in range(30)]
    assert statuses.count(200) >= 29
    wait_until(lambda: len(app.named(ROUTER)) == 2)
    assert app.complete(model="number-en", prompt="Q:", max_tokens=1)[0] == 200
