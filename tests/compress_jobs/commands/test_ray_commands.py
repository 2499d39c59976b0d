"""The commands of the README on a running Ray cluster: ``ray job submit``, ``serve deploy``, ``serve run``."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from tests.support.jobs import FEW, copy_adapters
from tests.support.paths import REPOSITORY
from tests.support.processes import running
from tests.support.ray_heads import free_port, started

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
PATIENCE_S = 180


def environment(**more: str) -> dict[str, str]:
    """As a user's with the virtual environment activated (a job's `python` is the one that Ray was started
    with), and as Ray asks since it protects its ports with a token."""
    return dict(os.environ) | {"PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"} | more


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 401:
                return  # the dashboard is up, and asks for Ray's token, which its own commands know
            assert process.poll() is None, f"{process.args} ended"
            assert time.monotonic() < deadline, f"{url}: {error}"
            time.sleep(0.5)


def run(*command: str, **more: str) -> str:
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(**more), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str]]:
    """A Ray head of this module's own with its dashboard: the dashboard's address and Ray's own."""
    port, dashboard_port, agent_port, client_port = (free_port() for _ in range(4))
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=8"),
        *(f"--port={port}", "--node-ip-address=127.0.0.1", "--object-store-memory=200000000"),
        *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}"),
        # Ray's own defaults are taken where another Ray runs on this machine.
        *(f"--dashboard-agent-listen-port={agent_port}", f"--ray-client-server-port={client_port}"),
    ]
    with started(command, environment(), REPOSITORY) as process:
        dashboard = f"http://127.0.0.1:{dashboard_port}"
        wait_for(f"{dashboard}/api/version", process)
        yield dashboard, f"127.0.0.1:{port}"


def answer(port: int) -> str:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
    completion = client.completions.create(
        model="number-en", prompt="Q: 450 in English words?\nA:", max_tokens=16, temperature=0, stop="\n"
    )
    return completion.choices[0].text


def test_a_submitted_job_publishes_and_a_deployed_application_serves_it(
    cluster: tuple[str, str], base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    dashboard, _ = cluster
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")
    config = tmp_path / "run.toml"
    config.write_text(f'adapters = "{adapters}"\nbase = "{base_path}"\nout = "{tmp_path / "out"}"\nclusters = 2\n')
    log = run(
        *(str(BIN / "ray"), "job", "submit", "--address", dashboard, "--working-dir", ".", "--"),
        *("python", "-m", "compress_jobs", "run", "--config", str(config)),
    )
    assert re.search(r"\bfit: (\d+)/\1\b", log), log  # plain lines in a job's log
    assert "published at" in log
    assert (tmp_path / "out" / "CURRENT").exists()

    port = free_port()
    document = yaml.safe_load((REPOSITORY / "infra" / "serve.yaml").read_text())
    document["http_options"]["port"] = port
    document["applications"][0]["args"] |= {"bundle": str(tmp_path / "out"), "base": str(base_path)}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(document))
    run(str(BIN / "serve"), "deploy", str(tmp_path / "serve.yaml"), "--address", dashboard)
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready?all=1", timeout=5):
            break
        assert time.monotonic() < deadline, run(str(BIN / "serve"), "status", "--address", dashboard)
        time.sleep(0.5)
    assert answer(port).strip() == "four hundred and fifty"
    run(str(BIN / "serve"), "shutdown", "--yes", "--address", dashboard)


@pytest.mark.by_hand
def test_serve_run_takes_the_arguments_from_the_line(
    cluster: tuple[str, str], base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    _, address = cluster
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:2])
    run(
        *(sys.executable, "-m", "compress_jobs", "run", "--adapters", str(adapters), "--base", str(base_path)),
        *("--out", str(tmp_path / "out"), "--rank", "16"),
        RAY_ADDRESS=address,
    )
    command = [
        *(str(BIN / "serve"), "run", "--address", address, "serve_app.app:build"),
        *(f"bundle={tmp_path / 'out'}", f"base={base_path}", "device=cpu", "limits.max_batch=4"),
    ]
    with running(*command, **environment()) as process:
        # The port that Serve takes by itself.
        wait_for("http://127.0.0.1:8000/ready?all=1", process)
        assert answer(8000).strip() == "four hundred and fifty"
