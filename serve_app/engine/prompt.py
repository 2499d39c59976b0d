"""A request's prompt as token ids, and every reason to refuse the request before it runs."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cluster.errors import RequestError
from serve_app.engine.protocol import GenerationRequest
from serve_app.engine.template_process import TemplateProcess

TOO_LONG = "context_length_exceeded"


@dataclass(frozen=True)
class PromptReader:
    """For one base model: its tokenizer, the ids it has embeddings for, and the context's length in tokens;
    ``templates`` renders those that adapters brought."""

    tokenizer: Any
    vocab_size: int
    max_model_len: int
    templates: TemplateProcess = field(default_factory=TemplateProcess)
    # Threads of its own: whoever waits for an adapter's template keeps nobody else from being read.
    _waiting: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "adapter-templates"))

    async def read_aside(self, request: GenerationRequest, chat_template: str | None = None) -> tuple[list[int], int]:
        """``read`` in a thread: a long text takes a while to tokenize, and the event loop has others to serve."""
        apart = self._waiting if chat_template is not None and request.messages is not None else None
        return await asyncio.get_running_loop().run_in_executor(apart, self.read, request, chat_template)

    def close(self) -> None:
        """No template is rendered any more."""
        self.templates.close()
        self._waiting.shutdown(wait=False)

    def read(self, request: GenerationRequest, chat_template: str | None = None) -> tuple[list[int], int]:
        """The prompt's token ids and how many tokens may follow. ``chat_template``: the adapter's own, None for the
        base's. Raises RequestError."""
        _check_options(request)
        param = "messages" if request.messages is not None else "prompt"
        token_ids = self._token_ids(request, chat_template)
        if not token_ids:
            raise RequestError(f"the {param} is empty; at least one token is needed", param)
        if outside := [token for token in token_ids if not 0 <= token < self.vocab_size]:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}", param)
        for name, tokens in (
            ("logit_bias", [t for t, _ in request.logit_bias]),
            ("stop_token_ids", request.stop_token_ids),
        ):
            if outside := [token for token in tokens if not 0 <= token < self.vocab_size]:
                raise RequestError(
                    f"{name}: token id {outside[0]} is outside the vocabulary of {self.vocab_size}", name
                )
        room = self.max_model_len - len(token_ids)
        if room <= 0:
            raise RequestError(
                f"the {param} has {len(token_ids)} tokens, the context holds {self.max_model_len} with the answer; "
                "shorten it",
                param,
                TOO_LONG,
            )
        max_tokens = room if request.max_tokens is None else request.max_tokens
        if max_tokens > room:
            raise RequestError(
                f"the {param} has {len(token_ids)} tokens and max_tokens is {max_tokens}, together "
                f"{len(token_ids) + max_tokens}, but the context holds {self.max_model_len}; "
                f"ask for {room} tokens at most",
                "max_tokens",
                TOO_LONG,
            )
        if request.min_tokens > max_tokens:
            raise RequestError(f"min_tokens is {request.min_tokens}, but at most {max_tokens} tokens fit", "min_tokens")
        return token_ids, max_tokens

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        # The tokenizer makes its mapping anew each time.
        return {str(token): number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def special_stops(self, stops: Sequence[str]) -> tuple[int, ...]:
        """Ids of those stops that are special tokens: no text has them, so that their tokens must end the answer.

        Raises RequestError where one is a part of a longer stop, which could never be met."""
        special = self._special_tokens
        for stop in stops:
            if stop not in special and (within := [token for token in special if token in stop]):
                raise RequestError(
                    f"stop {stop[:100]!r} holds the special token {within[0]!r}, which no text has; give that alone",
                    "stop",
                )
        return tuple(special[stop] for stop in stops if stop in special)

    def _token_ids(self, request: GenerationRequest, chat_template: str | None) -> list[int]:
        if request.prompt_token_ids is not None:
            return list(request.prompt_token_ids)
        if request.prompt is not None:
            return self._encode("prompt", lambda: self.tokenizer(request.prompt)["input_ids"])
        if not request.messages:
            raise RequestError("messages is empty; at least one message is needed", "messages")
        messages = [dict(message) for message in request.messages]
        if chat_template is not None:
            text = self.templates.render(chat_template, messages, dict(self.tokenizer.special_tokens_map))
            # The template writes the special tokens itself.
            return self._encode("messages", lambda: self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._encode(
            "messages",
            lambda: self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            ),
        )

    @staticmethod
    def _encode(param: str, encode: Callable[[], Any]) -> list[int]:
        try:
            return [int(token) for token in encode()]
        except Exception as error:
            # A chat template is a program of the base model: it may raise anything.
            raise RequestError(f"{param} cannot be tokenized: {type(error).__name__}: {error}", param) from error


def _check_options(request: GenerationRequest) -> None:
    given = [request.prompt is not None, request.prompt_token_ids is not None, request.messages is not None]
    if sum(given) != 1:
        raise RequestError("exactly one of prompt, prompt_token_ids and messages is needed", "prompt")

    def need(condition: bool, param: str, expected: str) -> None:
        if not condition:
            raise RequestError(f"{param} is {getattr(request, param)!r}, expected {expected}", param)

    need(request.max_tokens is None or request.max_tokens >= 1, "max_tokens", "1 or more")
    need(request.min_tokens >= 0, "min_tokens", "0 or more")
    need(math.isfinite(request.temperature) and request.temperature >= 0, "temperature", "0 or more")
    need(0 < request.top_p <= 1, "top_p", "more than 0 and at most 1")
    need(request.top_k >= 0, "top_k", "0 or more")
    need(0 <= request.min_p <= 1, "min_p", "0 to 1")
    for name in ("presence_penalty", "frequency_penalty"):
        need(-2 <= getattr(request, name) <= 2, name, "-2 to 2")
    need(0 < request.repetition_penalty < math.inf, "repetition_penalty", "more than 0")
    need(all(math.isfinite(bias) for _, bias in request.logit_bias), "logit_bias", "finite numbers")
    need(request.logprobs is None or request.logprobs >= 0, "logprobs", "0 or more")
    need(all(request.stop), "stop", "strings of at least one character")
