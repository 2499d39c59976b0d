"""Answers held to a JSON schema: before each token, what the schema does not allow next is ruled out.

The parser and the masks are llguidance's, which vLLM has as one of its backends too.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from torch import Tensor

from cluster.errors import RequestError

# A schema that allows white space anywhere lets a small model write nothing else.
_KEPT = 32
_COMPACT: Any = {"whitespace_flexible": False}


class Grammar:
    """Of one answer; it knows what has been said so far."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def restrict(self, logits: Tensor) -> None:
        """-inf, in place, for every token of logits (V,) that cannot come next."""
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        # Rows of the base's embedding beyond the tokenizer's words stand for nothing.
        allowed = torch.nn.functional.pad(allowed, (0, max(0, len(logits) - len(allowed))))[: len(logits)]
        logits.masked_fill_(allowed.to(logits.device) == 0, -torch.inf)

    def accept(self, token: int) -> None:
        """Raises RequestError for a token that could not come next, and where the parser has reached its limits."""
        if self._matcher.is_error() or not self._matcher.consume_token(token):
            why = self._matcher.get_error().partition("\n")[0][:200]
            raise RequestError(f"the schema cannot be followed: {why}", "response_format")

    @property
    def is_over(self) -> bool:
        """Whether nothing may follow any more."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Makes them, for one tokenizer: a copy for each answer, for they have state, of a schema that is compiled once."""

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, sorted(eos_ids)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        # One at a time, and a thread of its own: a large schema keeps nobody's prompt from being read.
        self._compiling = ThreadPoolExecutor(1, "schemas")

    async def make_aside(self, schema: str) -> Grammar:
        return await asyncio.get_running_loop().run_in_executor(self._compiling, self.make, schema)

    def close(self) -> None:
        self._compiling.shutdown(wait=False)

    def make(self, schema: str) -> Grammar:
        """Takes a second for the first one, and seconds for the largest that are let in. Raises RequestError."""
        matcher = self._compiled.get(schema) or self._compile(schema)
        self._compiled[schema] = matcher
        self._compiled.move_to_end(schema)
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Grammar(matcher.deep_copy())

    def _compile(self, schema: str) -> LLMatcher:
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_COMPACT)
            matcher = LLMatcher(self._words, grammar, log_level=0)
        except ValueError as error:
            raise RequestError(f"the schema cannot be used: {error}", "response_format") from None
        if matcher.is_error():
            raise RequestError(f"the schema cannot be used: {matcher.get_error()[:500]}", "response_format")
        return matcher

    @cached_property
    def _words(self) -> Any:
        return from_tokenizer(self._tokenizer, eos_token=self._eos_ids)
