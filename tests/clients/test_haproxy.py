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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.bundle.revisions import object_key
from tests.support.application import App, wait_until
from tests.support.bundles import flip_a_byte, write_bundle
from tests.support.paths import REPOSITORY
from tests.support.processes import running
from tests.support.ray_heads import free_port
from tests.support.serving import PATIENCE_S

pytestmark = pytest.mark.slow

ROUTER = "ray::ServeReplica:compress-then-serve:router"


@dataclass(frozen=True, kw_only=True)
class Served(App):
    """``process`` is `serve run`'s, and all of Ray's are below it; ``own_ports`` are HAProxy's besides ``port``."""

    process: subprocess.Popen[bytes]
    own_ports: tuple[int, ...]

    def complete(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        return self.call("POST", "/v1/completions", json.dumps(fields).encode())

    def named(self, name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> Iterator[Served]:
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
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # Two on one machine would have the same ports otherwise.
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports["stats"]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports["metrics"]),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Else it first looks for the Ray that was last started on this machine, even one that is gone.
        "RAY_ADDRESS": "local",
    }
    command = str(Path(sys.executable).parent / "serve"), "run", str(folder / "serve.yaml")
    with running(*command, **settings) as process:
        app = Served(port, process=process, own_ports=tuple(ports.values()))

        def is_ready() -> bool:
            assert process.poll() is None, "serve run ended"
            with contextlib.suppress(OSError, http.client.HTTPException, json.JSONDecodeError):
                return all(app.call("GET", "/ready")[0] == 200 for _ in range(8))  # by both routers
            return False

        wait_until(is_ready, PATIENCE_S)
        yield app


def test_whole_and_streamed_answers_are_the_same_and_name_who_answered(app: Served) -> None:
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
    app: Served, method: str, path: str, fields: dict[str, Any], status: int, code: str
) -> None:
    seen, _, body = app.call(method, path, json.dumps(fields).encode() if fields else None)
    assert (seen, body["error"]["code"]) == (status, code)


def test_one_bad_adapters_503s_take_no_router_out_of_service(app: Served) -> None:
    for _ in range(20):
        status, headers, body = app.complete(model="broken", prompt="x")
        assert status == 503
        assert "sha256" in body["error"]["message"]
        assert headers["retry-after"]
        assert app.complete(model="roman", prompt="Q:", max_tokens=1)[0] == 200


def test_a_client_that_closes_its_side_is_taken_for_one_that_has_left_as_the_readme_says(app: Served) -> None:
    """Serve's template sets abortonclose, which also frees the rows of those that have left."""
    with contextlib.closing(app.send({"model": "roman", "prompt": "Q:", "max_tokens": 20})) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_a_client_that_leaves_frees_its_row(app: Served) -> None:
    def running_rows() -> int:
        return int(app.group("group-0")["num_running"])

    for _ in range(2):
        with app.long_stream("roman"):
            wait_until(lambda: running_rows() == 1)
        wait_until(lambda: running_rows() == 0)


def test_it_listens_where_the_readme_says(app: Served) -> None:
    listening: set[tuple[str, int]] = set()
    for process in app.named("/haproxy -"):
        own = process.net_connections("inet")
        listening |= {(c.laddr.ip, c.laddr.port) for c in own if c.status == psutil.CONN_LISTEN}
    everywhere = {(ip, number) for ip in ("0.0.0.0", "::") for number in app.own_ports}
    assert ("127.0.0.1", app.port) in listening
    assert {number for ip, number in listening & everywhere} == set(app.own_ports)
    assert listening - everywhere == {("127.0.0.1", app.port)}


def test_a_killed_router_takes_its_own_requests_along_and_no_others(app: Served) -> None:
    wait_until(lambda: len(app.named(ROUTER)) == 2)
    os.kill(app.named(ROUTER)[0].pid, signal.SIGKILL)

    def is_answered() -> bool:
        # HAProxy cuts the connection of what it had just sent to it.
        with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
            return app.complete(model="roman", prompt="Q:", max_tokens=1)[0] == 200
        return False

    answered = [is_answered() for _ in range(30)]
    assert answered.count(True) >= 29
    wait_until(lambda: len(app.named(ROUTER)) == 2)
    assert app.complete(model="number-en", prompt="Q:", max_tokens=1)[0] == 200
