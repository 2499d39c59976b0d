"""Answers to prompts that end in half a character, or in U+FFFD, begin with the answer.

vLLM turns tokens into text by the tokenizers library's DecodeStream, which is given the prompt and says what comes
after it. Of a prompt whose text ends in U+FFFD, the sign for bytes that are no character yet, it takes nothing as said:
the answer begins with the whole prompt, and stop strings are found in that (vLLM 0.32.0, and so its own server). Here
it is given such a prompt up to its last whole character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from vllm.v1.engine import detokenizer
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Looked at together: a character has four bytes at most, and a byte may be a token, among special ones.
_WINDOW = 16
# Of a longer run nothing of the prompt is given: it only tells a decoder that its first token begins no text.
_MOST_DROPPED = 64


def rebind() -> None:
    """In this process, for the requests that come."""
    detokenizer.FastIncrementalDetokenizer = Detokenizer


class Detokenizer(FastIncrementalDetokenizer):
    def __init__(self, tokenizer: Any, request: Any) -> None:
        super().__init__(tokenizer, request)
        prompt = request.prompt_token_ids or []
        whole = num_whole(self.tokenizer, prompt, self.skip_special_tokens)
        if whole < len(prompt):
            self.stream = DecodeStream(ids=prompt[:whole], skip_special_tokens=self.skip_special_tokens)


def num_whole(tokenizer: Any, token_ids: Sequence[int], skip_special_tokens: bool) -> int:
    """How many of the tokens, from the first on, have a text that does not end in U+FFFD."""
    for end in range(len(token_ids), max(0, len(token_ids) - _MOST_DROPPED), -1):
        window = list(token_ids[max(0, end - _WINDOW) : end])
        if not tokenizer.decode(window, skip_special_tokens=skip_special_tokens).endswith(_INCOMPLETE):
            return end
    return 0
