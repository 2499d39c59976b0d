"""One request on its way through the engine: its tokens so far, its text, and whom to tell."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from torch import Tensor

from cluster.bundle.serving_map import ServedAdapter
from serve_app.engine.protocol import GenerationChunk, GenerationRequest, TokenLogprobs
from serve_app.engine.transformers.grammar import Grammar
from serve_app.engine.transformers.sampling import Sampling
from serve_app.engine.transformers.text_stream import TextStream

Answer = GenerationChunk | Exception


class Generation:
    """Touched by the engine's thread alone, but for ``cancelled``, which the request's owner sets."""

    def __init__(
        self,
        request: GenerationRequest,
        served: ServedAdapter | None,
        prompt_ids: list[int],
        max_tokens: int,
        tokenizer: Any,
        deliver: Callable[[Answer], None],
        grammar: Grammar | None = None,
    ) -> None:
        self.request = request
        self.served = served
        self.home = served.home if served else None
        self.slot = served.slot if served else 0
        self.prompt_ids = prompt_ids
        self.output_ids: list[int] = []
        self.cancelled = False
        self.deliver = deliver
        self.grammar = grammar
        seed = secrets.randbits(64) if request.seed is None else request.seed
        self.sampling = Sampling(request.temperature, request.top_p, seed, request.top_k, request.min_p)
        self._max_tokens = max_tokens
        self._text = TextStream(tokenizer, request.stop, request.min_tokens)
        self._tokenizer = tokenizer

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def may_end(self) -> bool:
        """Whether an end-of-sequence token, or one of ``stop_token_ids``, may be drawn next."""
        return len(self.output_ids) >= self.request.min_tokens

    def accept(self, token: int, eos_ids: frozenset[int], log_probs: Tensor | None = None) -> GenerationChunk:
        """Take the next token. One that ends the answer counts, but has no text. ``log_probs`` (V,) if asked for."""
        self.output_ids.append(token)
        text, finish_reason = "", None
        if self.grammar is not None:
            self.grammar.accept(token)
        if token in self.request.stop_token_ids or (token in eos_ids and not self.request.ignore_eos):
            text, finish_reason = self._text.finish(), "stop"
        else:
            text = self._text.push(token)
            if self.grammar is not None and self.grammar.is_over and not self._text.stopped:
                text, finish_reason = text + self._text.finish(), "stop"
            if finish_reason is None and not self._text.stopped and len(self.output_ids) == self._max_tokens:
                text, finish_reason = text + self._text.finish(), "length"
            if self._text.stopped:
                finish_reason = "stop"
        if self.request.echo and len(self.output_ids) == 1:
            text = self._prompt_text() + text
        told = () if log_probs is None else (self._told(token, log_probs),)
        return GenerationChunk(text, (token,), len(self.prompt_ids), len(self.output_ids), finish_reason, told)

    def _told(self, token: int, log_probs: Tensor) -> TokenLogprobs:
        values, tokens = log_probs.topk(self.request.logprobs or 0)
        top = zip(map(self._decode, tokens.tolist()), values.tolist(), strict=True)
        return TokenLogprobs(self._decode(token), float(log_probs[token]), tuple(top))

    def _prompt_text(self) -> str:
        return self.request.prompt if self.request.prompt is not None else self._decode(self.prompt_ids)

    def _decode(self, tokens: int | list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
