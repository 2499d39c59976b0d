"""A node is lost under load. Ray is started as operators do, in processes of its own, and the application by
`serve deploy`."""

from __future__ import annotations

import contextlib
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.bundle.manifest import Manifest
from infra.demo.application import SERVE_SETTINGS
from tests.support.application import App, wait_until
from tests.support.bundles import write_bundle
from tests.support.load import NUM_TOKENS, PROMPT, Load
from tests.support.ray_heads import BIN, TOKEN, Head, free_port, ray_head, ray_node
from tests.support.serving import ENGINE, PATIENCE_S, Peft

pytestmark = [pytest.mark.slow, pytest.mark.by_hand]

AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
ADAPTERS = ("roman", "number-en", "past")
CLIENTS = 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, base_path: Path, zoo_path: Path) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("losing") / "out"
    return out, write_bundle(out, base_path, {"0": {name: zoo_path / name for name in ADAPTERS}}, {})


@pytest.fixture(scope="module")
def expected(bundle: tuple[Path, Manifest], base_path: Path, zoo_path: Path) -> dict[tuple[str, str], str]:
    oracle = Peft(base_path)
    return {
        (name, bundle[1].adapters[name].served): oracle.answer(zoo_path / name, PROMPT, NUM_TOKENS) for name in ADAPTERS
    }


def deployed(head: Head, folder: Path, bundle: Path, base: Path, **args: Any) -> App:
    port = free_port()
    arguments: dict[str, Any] = {"bundle": str(bundle), "base": str(base), "engine": ENGINE, "device": "cpu"}
    arguments |= {"limits": {"max_batch": CLIENTS, "max_model_len": 512}}
    application = {"name": "losing", "route_prefix": "/", "import_path": "serve_app.app:build"}
    document = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "proxy_location": "HeadOnly",
        "applications": [application | {"args": arguments | args}],
    }
    config = folder / "serve.yaml"
    config.write_text(yaml.safe_dump(document))
    status, printed = head.run(str(BIN / "serve"), "deploy", "--address", head.dashboard, str(config), **AUTH)
    assert status == 0, printed
    app = App(port, "losing")
    wait_until(lambda: is_ready(app), PATIENCE_S)
    return app


def is_ready(app: App) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return app.call("GET", "/ready?all=1")[0] == 200
    return False


def told(what: str, load: Load, began: float) -> None:
    """A line of the README's table of faults."""
    lasted = max([at - began for at in load.troubled_at if at >= began], default=0.0)
    print(
        f"{what}: {len(load.failed)} failed, {len(load.cut)} cut, {len(load.wrong)} wrong of {load.num_answers}; "
        f"the last of these {lasted:.0f} s after it"
    )


def test_a_lost_node_takes_its_own_requests_along_and_is_done_without(
    bundle: tuple[Path, Manifest], expected: dict[tuple[str, str], str], base_path: Path, tmp_path: Path
) -> None:
    with ray_head(tmp_path, **SERVE_SETTINGS) as head, ExitStack() as stack:
        hidden = tmp_path / "hidden"
        hidden.mkdir()
        stack.enter_context(ray_node(head, hidden))
        app = deployed(
            head, tmp_path, bundle[0], base_path, placement={"replicas": 2, "devices": 2, "num_cpus": 1}, routers=1
        )
        wait_until(lambda: num_living(app) == 2, PATIENCE_S)
        with Load(app, expected, ADAPTERS, CLIENTS) as load:
            wait_until(partial(load.has_answered, 3 * CLIENTS))
            stack.close()
            began = time.monotonic()
            wait_until(lambda: num_living(app) == 1)
            wait_until(partial(load.has_answered, load.num_answers + 6 * CLIENTS))
        told("node lost", load, began)
        assert not load.wrong
        assert len(load.failed) + len(load.cut) <= CLIENTS, load.failed[:5]


def num_living(app: App) -> int:
    return sum(own["alive"] for own in app.group("group-0")["replicas"].values())
