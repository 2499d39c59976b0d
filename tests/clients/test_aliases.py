"""Aliases over HTTP: real Serve with two routers, the real engine and base, openai's client, the command that writes.

Who must answer a key is known from the definition of the choice; what an answer must be is PEFT's, with the folder of
the adapter that the answer's own header names.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
from ray import serve

from cluster.bundle.aliases import KEY, choose_target
from cluster.bundle.manifest import Manifest
from compress_jobs.__main__ import main
from serve_app.app import build
from tests.support.application import App, wait_until
from tests.support.bundles import write_bundle
from tests.support.load import NUM_TOKENS, PROMPT, Load, ask
from tests.support.serving import ENGINE, Peft, ray_with_serve

pytestmark = pytest.mark.slow

INTERVAL_S, SLACK_S = 0.5, 2.0
FOLDERS = {"v7": "roman", "v8": "number-en", "v9": "country-fr"}
SPLIT = {"v7": 90, "v8": 10}
USERS = [f"user-{number}" for number in range(200)]


@pytest.fixture(scope="module")
def answers(base_path: Path, zoo_path: Path) -> dict[str, str]:
    """Adapter -> PEFT's answer to PROMPT."""
    oracle = Peft(base_path)
    said = {name: oracle.answer(zoo_path / folder, PROMPT, NUM_TOKENS) for name, folder in FOLDERS.items()}
    assert len(set(said.values())) == len(said), "the oracle must tell adapters apart"
    return said


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("aliased") / "out"


@pytest.fixture(scope="module")
def publish(out: Path, base_path: Path, zoo_path: Path) -> Callable[..., Manifest]:
    """A revision with these adapters."""
    rooms = {"0": [zoo_path / folder for folder in FOLDERS.values()]}

    def publish(*names: str, after: Manifest | None = None) -> Manifest:
        members = {name: zoo_path / FOLDERS[name] for name in names}
        return write_bundle(out, base_path, {"0": members}, {}, room=rooms, after=after)

    return publish


@pytest.fixture(scope="module")
def first(publish: Callable[..., Manifest]) -> Manifest:
    return publish("v7", "v8")


@pytest.fixture(scope="module")
def deploy(base_path: Path) -> Iterator[Callable[..., App]]:
    with ray_with_serve(num_cpus=4) as port:

        def deploy(name: str, **options: Any) -> App:
            args = {"base": str(base_path), "engine": ENGINE, "limits.max_batch": 8, "limits.max_model_len": 512}
            serve.run(build(args | {"refresh_interval_s": INTERVAL_S} | options), name=name, route_prefix=f"/{name}")
            app = App(port, name, f"/{name}")
            wait_until(partial(by_every_router, lambda: app.call("GET", "/ready?all=1")[0] == 200))
            return app

        yield deploy


@pytest.fixture(scope="module")
def app(deploy: Callable[..., App], out: Path, first: Manifest) -> App:
    return deploy("aliased", bundle=str(out), routers=2)


@pytest.fixture
def alias(app: App, out: Path) -> Callable[..., None]:
    """The command, and until every router has followed."""

    def alias(name: str, **targets: int) -> None:
        assert main(["alias", str(out), name, "--to", *(f"{own}={weight}" for own, weight in targets.items())]) == 0
        wait_until(partial(by_every_router, lambda: app.call("GET", f"/v1/models/{name}")[2].get("targets") == targets))

    return alias


def by_every_router(holds: Callable[[], bool]) -> bool:
    return all(holds() for _ in range(8))


def asked(app: App, user: str | None = None, key: str | None = None, model: str = "support") -> tuple[str, str, str]:
    """Who answered, as the header says, what the answer calls itself, and what it says."""
    raw = app.client.completions.with_raw_response.create(
        model=model,
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True} | ({"user": user} if user is not None else {}),
        extra_headers={"X-Sticky-Key": key} if key is not None else {},
    )
    answer = raw.parse()
    return raw.headers.get("x-adapter", ""), answer.model, answer.choices[0].text


def all_asked(app: App, users: Sequence[str], **fields: Any) -> list[tuple[str, str, str]]:
    """``fields``: of ``asked``, each made of the user."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda user: asked(app, **{name: make(user) for name, make in fields.items()}), users))


def test_a_canary_gets_its_share_of_the_users_each_always_the_same_and_peft_says_what_the_header_says(
    app: App, alias: Callable[..., None], answers: dict[str, str]
) -> None:
    alias("support", **SPLIT)
    said = all_asked(app, USERS, user=str)
    found = [adapter for adapter, _, _ in said]
    assert found == [choose_target("support", SPLIT, user.encode()) for user in USERS]
    assert abs(found.count("v8") - 20) <= 3 * math.sqrt(200 * 0.1 * 0.9)
    assert said == [(adapter, "support", answers[adapter]) for adapter in found]
    # The same key in the header, and the header before the user.
    assert all_asked(app, USERS[:60], key=str, user=lambda _: "somebody") == said[:60]
    alias("support", v7=50, v8=50)
    # A canary that grows keeps the users that it has.
    canaries = [user for user, adapter in zip(USERS, found, strict=True) if adapter == "v8"]
    assert {adapter for adapter, _, _ in all_asked(app, canaries, user=str)} == {"v8"}
    # A text beyond ASCII is the same key in both places; openai's client sends none in a header.
    body = json.dumps({"model": "support", "prompt": PROMPT, "max_tokens": 1}).encode()
    for user in (f"üser-{number}" for number in range(8)):
        with app.open("POST", "/v1/completions", {"X-Sticky-Key": user.encode().decode("latin-1")}, body) as answer:
            assert answer.headers["X-Adapter"] == asked(app, user=user)[0]
    # Nobody in particular: at random.
    assert {adapter for adapter, _, _ in all_asked(app, USERS[:40], user=lambda _: None)} == {"v7", "v8"}


@pytest.mark.by_hand
def test_streams_and_chats_say_what_was_asked_for_and_the_header_who_answered(
    app: App, alias: Callable[..., None], first: Manifest
) -> None:
    alias("support", v8=1)
    for create, ask_for in (
        (app.client.completions.with_raw_response.create, {"prompt": PROMPT}),
        (app.client.chat.completions.with_raw_response.create, {"messages": [{"role": "user", "content": "48?"}]}),
    ):
        fields: dict[str, Any] = {"model": "support", "max_tokens": 3, "temperature": 0} | ask_for
        whole = create(**fields)
        streamed = create(**fields, stream=True)
        assert {chunk.model for chunk in streamed.parse()} == {whole.parse().model} == {"support"}
        for raw in (whole, streamed):
            assert raw.headers["x-adapter"] == "v8"
            assert raw.headers["x-served-revision"] == first.adapters["v8"].served
    assert asked(app, model="v7")[0] == "v7"
    assert asked(app, model=first.base.name)[:2] == ("", first.base.name)
    if ENGINE == "vllm":
        body = json.dumps({"model": "support", "prompt": PROMPT}).encode()
        assert app.call("POST", "/tokenize", body)[1]["x-adapter"] == "v8"


def test_rollback_is_one_write_that_takes_effect_in_time_and_fails_no_request(
    app: App, alias: Callable[..., None], out: Path, answers: dict[str, str], first: Manifest
) -> None:
    canaries = [user for user in USERS if choose_target("support", SPLIT, user.encode()) == "v8"]
    expected = {("support", first.adapters[name].served): answers[name] for name in ("v7", "v8")}
    with Load(app, expected, ("support",), 4) as load:
        for _ in range(2):
            alias("support", **SPLIT)
            assert [asked(app, user=user)[0] for user in canaries[:8]] == ["v8"] * 8
            load.served.clear()
            wait_until(lambda: len(load.served) == 2)
            assert main(["alias", str(out), "support", "--to", "v7"]) == 0
            time.sleep(INTERVAL_S + SLACK_S)
            assert [asked(app, user=user)[0] for user in canaries[:8]] == ["v7"] * 8
    assert not load.failed, load.failed[:5]
    assert load.num_answers > 50


@pytest.mark.by_hand
def test_an_adapter_gets_its_share_as_soon_as_it_is_loaded_and_no_request_fails_before(
    app: App,
    alias: Callable[..., None],
    out: Path,
    publish: Callable[..., Manifest],
    answers: dict[str, str],
    first: Manifest,
) -> None:
    alias("support", v7=50, v8=50)
    expected = {("support", first.adapters[name].served): answers[name] for name in ("v7", "v8")}
    with Load(app, expected, ("support",), 4) as load:
        wait_until(lambda: load.num_answers > 20)
        second = publish("v7", "v8", "v9", after=first)
        expected |= {("support", second.adapters[name].served): answers[name] for name in answers}
        assert main(["alias", str(out), "support", "--to", "v7=20", "v9=80"]) == 0
        wait_until(lambda: ("support", second.adapters["v9"].served) in load.served)
        wait_until(partial(load.has_answered, load.num_answers + 40))
    assert not load.failed, load.failed[:5]


@pytest.mark.by_hand
def test_what_is_wrong_with_an_alias_is_told_where_it_is_looked_for(
    app: App, alias: Callable[..., None], out: Path
) -> None:
    alias("support", v7=90, v8=10)
    good = (out / KEY).read_bytes()
    listed = {card["id"]: card for card in app.call("GET", "/v1/models")[2]["data"]}
    card = {"mode": "alias", "targets": {"v7": 90, "v8": 10}, "status": "ready"}
    assert card.items() <= listed["support"].items()
    assert listed["support"] == app.call("GET", "/v1/models/support")[2]
    assert listed.keys() > {"support", "v7", "v8"}
    assert app.client.models.retrieve("support").id == "support"

    def told() -> dict[str, Any]:
        found: dict[str, Any] = app.call("GET", "/ready")[2]["aliases"]
        return found

    assert told() == {"state": "loaded", "faults": {}}
    # Broken: what was is in force.
    (out / KEY).write_text('{"format": 1, "aliases": {"support": {"v8": 0}}}')
    wait_until(partial(by_every_router, lambda: "no target has a weight above 0" in told()["state"]))
    assert {asked(app, user=user)[0] for user in USERS[:40]} == {"v7", "v8"}
    # An adapter's name, a target that is not there.
    (out / KEY).write_text('{"format": 1, "aliases": {"v7": {"v8": 1}, "support": {"v6": 1}}}')
    wait_until(partial(by_every_router, lambda: told()["faults"].keys() == {"v7", "support"}))
    assert told()["state"] == "loaded"
    assert asked(app, model="v7")[0] == "v7"
    assert app.call("GET", "/v1/models/v7")[2]["mode"] == "core"
    with pytest.raises(openai.NotFoundError, match=r"'support' is an alias.*'v6', is not in the served revision"):
        asked(app)
    assert ask(app, "support", stream=True)[0] == 404
    assert app.call("GET", "/v1/models/support")[2]["status"] == "v6 is not in the served revision"
    assert app.call("GET", "/ready?all=1")[0] == 200
    (out / KEY).write_bytes(good)
    wait_until(partial(by_every_router, lambda: told()["faults"] == {}))


@pytest.mark.by_hand
def test_a_pinned_revision_follows_aliases(deploy: Callable[..., App], out: Path, first: Manifest) -> None:
    assert main(["alias", str(out), "pinned", "--to", "v7"]) == 0
    app = deploy("pinned", bundle=f"{out}/bundles/{first.bundle}", revision=0)
    assert asked(app, model="pinned")[0] == "v7"
    assert main(["alias", str(out), "pinned", "--to", "v8"]) == 0
    time.sleep(INTERVAL_S + SLACK_S)
    assert asked(app, model="pinned")[0] == "v8"
