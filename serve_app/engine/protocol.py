"""What the router's replicas ask of an engine, whichever library runs inside.

An engine imports no Ray and no HTTP: it must run on a machine that has only torch and its own library.

A **home** is what has to be resident for an adapter to be answered: its cluster, or, for a truncated or raw adapter,
the stack of factors that it has a slot in. Homes are named as in ``cluster.bundle.serving_map``: ``cluster:0``,
``factors:2.0``. An engine holds one revision of its bundle or several; of one adapter two may be in one batch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

from cluster.bundle.serving_map import ServedAdapter
from serve_app.engine.revisions import Revision, RevisionHealth


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to continue.

    ``adapter`` is an adapter id, or None for the base model; ``revision`` the bundle's that it is meant of, None for
    the one that came last. Exactly one of ``prompt`` (text, tokenized as
    it stands with the tokenizer's own special tokens), ``prompt_token_ids`` and ``messages`` (chat, through
    the adapter's own chat template where it brought one, else the base's) is set. ``max_tokens`` None means: up to the
    context's end.
    ``seed`` None means: fresh randomness. ``temperature`` 0 is greedy. ``top_k`` 0 means: all tokens. ``logit_bias``:
    token id -> what is added to its logit. A token of ``stop_token_ids`` ends the answer, and has no text. How logits
    become a token, and in which order: ``serve_app/engine/transformers/sampling.py``; vLLM does the same. ``logprobs``:
    how many of the most probable tokens are told at each step, None: not even the chosen one. ``echo``: the answer
    begins with the prompt's text. ``json_schema``: the answer is JSON that it allows. (The vLLM engine does none of
    these three here: there vLLM's own serving classes answer.)
    """

    request_id: str
    adapter: str | None
    prompt: str | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, str], ...] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    json_schema: str | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    revision: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one token of an answer: its log probability by the model's logits, before anything was done to them, and those
    of the most probable tokens, the most probable first. A text is of its token alone."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of an answer, in order. The last one, and only it, has ``finish_reason`` ("stop" or "length").

    ``text`` never ends inside a character, and never holds any part of a stop string that matched.
    ``num_prompt_tokens`` and ``num_completion_tokens`` are running totals. ``logprobs``, where they are asked for: of
    each of ``token_ids``.
    """

    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_completion_tokens: int
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class EngineHealth:
    """``revisions`` are those that can be asked for. ``num_running`` requests are in the batch, ``num_waiting`` wait
    for a place in it."""

    alive: bool
    revisions: dict[int, RevisionHealth] = field(default_factory=dict)
    num_running: int = 0
    num_waiting: int = 0


class Engine(Protocol):
    """``generate`` raises RequestError for a request it cannot answer, UnknownAdapter for an adapter that is not in the
    revision, HomeUnavailable for one that failed, or whose home did, and for a revision that is not held. They come
    before the first chunk. EngineStopped, and ServeError for an answer that failed, may come at any time.
    Closing the stream (aclose, or cancelling its consumer) frees the batch row.
    """

    async def start(self) -> None:
        """Load the base and the revision the engine was made with. A home that fails, and an adapter of a home
        that does not, is recorded as unavailable in ``health`` and never raised; a base that fails is raised."""

    def find(self, adapter_id: str, revision: int | None = None) -> ServedAdapter:
        """As that revision has it (None: the one that came last). Raises UnknownAdapter, HomeUnavailable."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]: ...

    async def take_up(self, revision: Revision) -> None:
        """Hold this revision too: what it has in common with others is there already. Raises BundleError where anything
        of it fails that did not fail before; then it is not held. One that is held already: what failed is tried again,
        recorded and not raised. Not beside another such call. Raises EngineStopped."""

    async def release(self, number: int) -> None:
        """Forget this revision, and what no other has; requests already running on it finish first."""

    def health(self) -> EngineHealth: ...

    async def ping(self) -> None:
        """Returns when the engine's loop has come round: never where a step hangs. Raises EngineStopped."""

    async def stop(self) -> None: ...
