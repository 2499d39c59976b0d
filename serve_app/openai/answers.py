"""Answers of the OpenAI API: completions, chats, their streamed chunks, and models.

Serialized with ``exclude_unset``: a field that was not given does not appear, one given as None appears as
null (OpenAI tells ``"usage": null`` in a chunk from no usage at all).
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel

from cluster.bundle.aliases import Targets
from cluster.bundle.serving_map import ServedAdapter
from serve_app.engine.protocol import GenerationChunk, TokenLogprobs

FinishReason = str | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Choice(BaseModel):
    """``text`` in completions, ``message`` in chats, ``delta`` in a chat's chunks."""

    index: int
    text: str | None = None
    message: dict[str, str] | None = None
    delta: dict[str, str] | None = None
    logprobs: dict[str, Any] | None = None
    finish_reason: FinishReason


class Answer(BaseModel):
    """A whole answer, or one chunk of a streamed one."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """``mode`` is core, truncated, raw or base. OpenAI has no fields from ``max_model_len`` on, vLLM has that."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    cluster: str | None
    mode: str
    version: str
    served_revision: str
    error: float
    chat_template: Literal["adapter", "base"]
    brought: dict[str, str]
    status: str


class AliasCard(BaseModel):
    """Of a name that stands for adapters: their own cards say the rest. ``targets``: adapter id -> weight."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    mode: Literal["alias"]
    targets: dict[str, int]
    status: str


class ModelPage(BaseModel):
    object: Literal["list"]
    data: list[ModelCard | AliasCard]
    first_id: str | None
    last_id: str | None
    has_more: bool


@dataclass
class Answering:
    """Builds the answer to one request, whole or chunk by chunk. ``continuous_usage``: every chunk counts what has come
    so far."""

    id: str
    model: str
    served: str
    chat: bool
    num_choices: int
    include_usage: bool
    continuous_usage: bool = False
    choices_a_prompt: int = 1
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self._last: list[GenerationChunk | None] = [None] * self.num_choices
        self._texts: list[list[str]] = [[] for _ in range(self.num_choices)]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(self.num_choices)]
        self._offsets = [0] * self.num_choices

    def add(self, index: int, chunk: GenerationChunk) -> None:
        """Take in a piece of choice ``index``."""
        self._last[index] = chunk
        self._texts[index].append(chunk.text)
        self._logprobs[index] += chunk.logprobs

    def whole(self) -> Answer:
        choices = []
        for index, texts in enumerate(self._texts):
            last = self._last[index]
            said = (
                {"message": {"role": "assistant", "content": "".join(texts)}} if self.chat else {"text": "".join(texts)}
            )
            told = self._told(index, self._logprobs[index])
            choices.append(self._choice(index, said, last.finish_reason if last else None, told))
        return self._answer("chat.completion" if self.chat else "text_completion", choices, usage=self.usage())

    def opening(self) -> Iterator[Answer]:
        """A chat's stream says who speaks before it says anything."""
        if self.chat:
            for index in range(self.num_choices):
                yield self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}}, None)])

    def piece(self, index: int, chunk: GenerationChunk) -> Answer:
        said: dict[str, Any] = {"delta": {"content": chunk.text}} if self.chat else {"text": chunk.text}
        return self._chunk([self._choice(index, said, chunk.finish_reason, self._told(index, chunk.logprobs))])

    def closing(self) -> Iterator[Answer]:
        if self.include_usage:
            yield self._answer(self._chunk_object, [], usage=self.usage())

    def usage(self) -> Usage:
        """Of what has answered so far: completions summed over the choices, each prompt counted once."""
        completion = sum(chunk.num_completion_tokens for chunk in self._last if chunk is not None)
        prompts = [self._last[i : i + self.choices_a_prompt] for i in range(0, self.num_choices, self.choices_a_prompt)]
        prompt = sum(max(chunk.num_prompt_tokens if chunk else 0 for chunk in choices) for choices in prompts)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _choice(
        self, index: int, said: dict[str, Any], finish_reason: FinishReason, logprobs: dict[str, Any] | None = None
    ) -> Choice:
        return Choice(index=index, **said, logprobs=logprobs, finish_reason=finish_reason)

    def _told(self, index: int, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        """Of tokens that come next in choice ``index``; None where no log probabilities are asked for."""
        if not tokens:
            return None
        if self.chat:
            return {
                "content": [
                    _token(token.text, token.logprob) | {"top_logprobs": [_token(*other) for other in token.top]}
                    for token in tokens
                ]
            }
        offsets = list(accumulate((len(token.text) for token in tokens), initial=self._offsets[index]))
        self._offsets[index] = offsets.pop()
        return {
            "text_offset": offsets,
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # The chosen token is among them, whether it is one of the most probable or not.
            "top_logprobs": [dict(token.top) | {token.text: token.logprob} for token in tokens],
        }

    def _chunk(self, choices: list[Choice]) -> Answer:
        if not self.include_usage:
            return self._answer(self._chunk_object, choices)
        return self._answer(self._chunk_object, choices, usage=self.usage() if self.continuous_usage else None)

    def _answer(self, kind: str, choices: list[Choice], **usage: Usage | None) -> Answer:
        return Answer(
            id=self.id,
            object=kind,
            created=self.created,
            model=self.model,
            system_fingerprint=self.served,
            choices=choices,
            **usage,
        )


def _token(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def adapter_card(adapter: ServedAdapter, created: int, max_model_len: int, status: str) -> ModelCard:
    return ModelCard(
        id=adapter.adapter_id,
        object="model",
        created=created,
        owned_by="compress-then-serve",
        max_model_len=max_model_len,
        cluster=adapter.cluster,
        mode=adapter.mode,
        version=adapter.version,
        served_revision=adapter.served,
        error=adapter.error,
        chat_template="base" if adapter.chat_template is None else "adapter",
        brought=dict(adapter.brought),
        status=status,
    )


def alias_card(alias: str, targets: Targets, created: int, max_model_len: int, status: str) -> AliasCard:
    return AliasCard(
        id=alias,
        object="model",
        created=created,
        owned_by="compress-then-serve",
        max_model_len=max_model_len,
        mode="alias",
        targets=dict(targets),
        status=status,
    )


def base_card(name: str, fingerprint: str, created: int, max_model_len: int, status: str) -> ModelCard:
    """The base is its own version, and is served as it is: without error."""
    return ModelCard(
        id=name,
        object="model",
        created=created,
        owned_by="compress-then-serve",
        max_model_len=max_model_len,
        cluster=None,
        mode="base",
        version=fingerprint,
        served_revision=fingerprint,
        error=0.0,
        chat_template="base",
        brought={},
        status=status,
    )


def page(ids: Sequence[str], after: str | None, limit: int) -> tuple[list[str], bool]:
    """At most ``limit`` of the sorted ``ids`` that come after ``after`` (which may itself be gone), and whether
    there are more. O(log n + limit)."""
    start = 0 if after is None else bisect_right(ids, after)
    return list(ids[start : start + limit]), start + limit < len(ids)
