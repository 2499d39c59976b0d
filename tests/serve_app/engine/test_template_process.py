"""Chat templates that adapters brought: rendered as transformers does, and no harm to anybody else by a bad one."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.errors import RequestError
from serve_app.engine.prompt import PromptReader
from serve_app.engine.protocol import GenerationRequest
from serve_app.engine.template_process import MAX_MESSAGES_SIZE, TemplateProcess

MESSAGES = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": '450 <in> "words" – ü?'})
SOUND = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role | upper }}] {{ m.content | tojson }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HUGE = (
    "{% set ns = namespace(x='abcdefgh') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
)
LONG = "{% for a in range(20000) %}{{ 'x' * 1000 }}{% endfor %}"


@pytest.fixture
def templates() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


@pytest.fixture(scope="module")
def tokenizer(base_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_path)


def test_a_chat_goes_through_the_adapters_template_as_transformers_applies_it(
    tokenizer: Any, templates: TemplateProcess
) -> None:
    reader = PromptReader(tokenizer, 49152, 512, templates)
    request = GenerationRequest("r", "roman", messages=MESSAGES, max_tokens=4)
    expected = tokenizer.apply_chat_template(
        list(MESSAGES), chat_template=SOUND, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert reader.read(request, SOUND) == (expected, 4)
    assert reader.read(request)[0] != expected


@pytest.mark.parametrize("bad", [ENDLESS, HUGE])
def test_a_template_that_takes_too_much_is_given_up_and_the_others_go_on(templates: TemplateProcess, bad: str) -> None:
    templates.render(SOUND, list(MESSAGES), {})
    with pytest.raises(RequestError, match="takes more than"):
        templates.render(bad, list(MESSAGES), {})
    with pytest.raises(RequestError, match="is not used again"):
        templates.render(bad, list(MESSAGES), {})
    assert "[ASSISTANT]" in templates.render(SOUND, list(MESSAGES), {})


def test_who_waits_behind_a_template_that_is_given_up_need_not_wait_for_it_again(templates: TemplateProcess) -> None:
    refused: list[str] = []

    def ask() -> None:
        with pytest.raises(RequestError) as caught:
            templates.render(ENDLESS, list(MESSAGES), {})
        refused.append(str(caught.value))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("correct it" in text for text in refused) == 1  # one has tried
    assert len(refused) == 8


@pytest.mark.parametrize("content", ["x" * 9_000_000, "\u4e00" * 1_500_000])
def test_messages_that_are_too_long_are_not_the_templates_fault(templates: TemplateProcess, content: str) -> None:
    with pytest.raises(RequestError, match="more than any context holds"):
        templates.render(SOUND, [{"role": "user", "content": content}], {})
    assert "hi" in templates.render(SOUND, [{"role": "user", "content": "hi"}], {})
    longest = content[: MAX_MESSAGES_SIZE - 100]
    assert longest[-9:] in templates.render("{{ messages[0].content }}", [{"role": "user", "content": longest}], {})


@pytest.mark.parametrize(
    "bad", ["{% for", "{{ raise_exception('no system role') }}", "{{ messages[9].content.x }}", LONG, "{{ 1 / 0 }}"]
)
def test_a_template_that_fails_is_the_requests_error_and_may_be_used_again(
    templates: TemplateProcess, bad: str
) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="the adapter's chat template cannot render this") as caught:
            templates.render(bad, list(MESSAGES), {})
        assert caught.value.param == "messages"


def test_a_template_cannot_reach_what_is_outside_its_sandbox(templates: TemplateProcess) -> None:
    with pytest.raises(RequestError):
        templates.render("{{ ''.__class__.__mro__[1].__subclasses__() }}", list(MESSAGES), {})


def test_several_threads_may_ask_at_once(templates: TemplateProcess) -> None:
    texts: dict[int, str] = {}

    def ask(number: int) -> None:
        texts[number] = templates.render("{{ messages[0].content }}", [{"role": "user", "content": f"m{number}"}], {})

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: f"m{number}" for number in range(8)}


def test_a_process_that_is_killed_whenever_costs_nobody_his_template(templates: TemplateProcess) -> None:
    for _ in range(4):
        templates.render(SOUND, list(MESSAGES), {})
        assert templates._process is not None
        templates._process.kill()  # not waited for: the pipe may still take the question


def test_nothing_is_rendered_after_the_end_and_who_waits_is_told(templates: TemplateProcess) -> None:
    failures: list[Exception] = []

    def ask() -> None:
        try:
            templates.render(ENDLESS, list(MESSAGES), {})
        except RequestError as error:
            failures.append(error)

    templates.render(SOUND, list(MESSAGES), {})
    asking = threading.Thread(target=ask)
    asking.start()
    templates.close()
    asking.join()
    assert len(failures) == 1
    with pytest.raises(RequestError, match="the engine is ending"):
        templates.render(SOUND, list(MESSAGES), {})


def test_an_endless_template_does_not_outlive_its_parent() -> None:
    parent = (
        "import os, threading, time; from serve_app.engine.template_process import TemplateProcess;"
        "t = TemplateProcess(); t.render('x', [], {}); print(t._process.pid, flush=True);"
        f"threading.Thread(target=t.render, args=({ENDLESS!r}, [], {{}})).start(); time.sleep(0.3); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True)
    child = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 60
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)


@pytest.mark.slow
def test_who_waits_for_an_adapters_template_keeps_nobody_else_from_being_read(tokenizer: Any) -> None:
    slow = "{% for a in range(40000) %}{% for b in range(20) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    reader = PromptReader(tokenizer, 49152, 512)
    chat = GenerationRequest("r", "roman", messages=MESSAGES, max_tokens=1)
    plain = GenerationRequest("p", None, prompt="1 + 1 =", max_tokens=1)

    async def ask() -> list[str]:
        order: list[str] = []

        async def one(request: GenerationRequest, template: str | None) -> None:
            with contextlib.suppress(RequestError):
                await reader.read_aside(request, template)
            order.append(request.request_id)

        await asyncio.gather(*(one(chat, slow) for _ in range(40)), one(plain, None))
        return order

    order = asyncio.run(ask())
    reader.close()
    assert order.index("p") < 5
