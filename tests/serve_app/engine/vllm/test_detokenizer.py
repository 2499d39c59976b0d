"""vLLM's detokenizer after prompts that end in no whole character: an answer's text is that of its tokens alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from serve_app.engine.vllm.plugin import compatibility

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(compatibility.vllm_version() is None, reason="vllm is not here")]

ANSWER = " is here, and \U0001f469\u200d\U0001f467 too"


@pytest.fixture(scope="module")
def tokenizer(base_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> dict[str, list[int]]:
    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    half = ids("\U0001f469")[:-1]
    return {
        "a whole character": ids("The sign"),
        "U+FFFD": ids("The sign \ufffd"),
        "half a character": ids("The sign ") + half,
        "nothing but half a character": half,
        "a special token after it": ids("The sign \ufffd<|im_end|>"),
        "very many of them": ids("The sign " + "\ufffd" * 200),
    }


def said(kind: Any, tokenizer: Any, prompt: list[int], answer: list[int], **options: Any) -> tuple[list[str], Any]:
    """Piece by piece, and the stop string that ended it."""
    params = SimpleNamespace(**{"stop": None, "min_tokens": 0, "include_stop_str_in_output": False} | options)
    params.skip_special_tokens = params.spaces_between_special_tokens = True
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt, prompt_embeds=None, request_id="0")
    detokenizer, pieces = kind(tokenizer, request), []
    for token in answer:
        stop = detokenizer.update([token], False)
        pieces.append(detokenizer.get_next_output_text(stop is not None, True))
        if stop is not None:
            return pieces, stop
    return [*pieces, detokenizer.get_next_output_text(True, True)], None


def test_an_answer_begins_with_the_answer_and_a_stop_is_looked_for_in_it_alone(
    tokenizer: Any, prompts: dict[str, list[int]]
) -> None:
    from serve_app.engine.vllm.detokenizer import Detokenizer

    answer = tokenizer(ANSWER)["input_ids"]
    for name, prompt in prompts.items():
        pieces, _ = said(Detokenizer, tokenizer, prompt, answer)
        assert "".join(pieces) == ANSWER, name
        assert pieces[0] == " is", name
        pieces, stop = said(Detokenizer, tokenizer, prompt, answer, stop=["sign", "here"])
        assert ("".join(pieces), stop) == (" is ", "here"), name


def test_the_bytes_that_end_the_prompts_last_character_are_none_of_their_own(
    tokenizer: Any, prompts: dict[str, list[int]]
) -> None:
    from serve_app.engine.vllm.detokenizer import Detokenizer

    rest = [*tokenizer("\U0001f469")["input_ids"][-1:], *tokenizer(" too")["input_ids"]]
    pieces, _ = said(Detokenizer, tokenizer, prompts["half a character"], rest)
    assert "".join(pieces) == tokenizer.decode(rest) == "\ufffd too"


def test_vllms_own_says_the_prompt_which_is_why_it_is_not_left_to_it(
    tokenizer: Any, prompts: dict[str, list[int]]
) -> None:
    """Where this fails, vLLM has mended it, and ours can go."""
    from serve_app.engine.vllm.detokenizer import Detokenizer

    theirs = Detokenizer.__base__  # in vLLM's module ours may stand by its name
    pieces, _ = said(theirs, tokenizer, prompts["U+FFFD"], tokenizer(" is")["input_ids"])
    assert "".join(pieces) == "The sign \ufffd is"
