"""Chat templates that adapters brought: rendered as transformers does, and no harm to anybody else by a bad one."""

from __future__ import annotations

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
from serve_app.engine.template_process import TIMEOUT_S, TemplateProcess

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


@pytest.mark.parametrize("bad", [ENDLESS, HUGE, LONG])
def test_a_template_that_takes_too_much_is_given_up_and_the_others_go_on(templates: TemplateProcess, bad: str) -> None:
    templates.render(SOUND, list(MESSAGES), {})
    began = time.monotonic()
    with pytest.raises(RequestError, match="took more than"):
        templates.render(bad, list(MESSAGES), {})
    with pytest.raises(RequestError, match="not used again"):
        templates.render(bad, list(MESSAGES), {})
    assert time.monotonic() - began < TIMEOUT_S + 15  # a bound against hanging, no measurement
    assert "[ASSISTANT]" in templates.render(SOUND, list(MESSAGES), {})


@pytest.mark.parametrize("bad", ["{% for", "{{ raise_exception('no system role') }}", "{{ messages[9].content.x }}"])
def test_a_template_that_fails_is_the_requests_error_and_may_be_used_again(
    templates: TemplateProcess, bad: str
) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="do not fit the adapter's chat template") as caught:
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


def test_a_process_that_was_killed_is_started_again(templates: TemplateProcess) -> None:
    templates.render(SOUND, list(MESSAGES), {})
    assert templates._process is not None
    templates._process.kill()
    templates._process.wait()
    assert templates.render(SOUND, list(MESSAGES), {})
