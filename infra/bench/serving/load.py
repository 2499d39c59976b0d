"""The load: which adapter is asked what, by how many clients at once, and what each answer took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

ZIPF_EXPONENT = 1.5


@dataclass(frozen=True)
class Load:
    """Lengths in tokens; every answer is exactly ``answer_tokens`` long."""

    prompt_tokens: int
    answer_tokens: int


LOADS = {"paper": Load(prompt_tokens=24, answer_tokens=10), "chat": Load(prompt_tokens=128, answer_tokens=64)}
POPULARITIES = ("uniform", "zipf")


@dataclass(frozen=True)
class Question:
    """``adapter`` is an index into the collection."""

    adapter: int
    prompt_ids: tuple[int, ...]


class Row(Protocol):
    """One thing that is measured: a server, started and warm."""

    name: str
    start_s: float
    resident_bytes: int

    def ask(self, question: Question, answer_tokens: int) -> AsyncIterator[int]:
        """Greedy, with end-of-sequence ignored. Yields how many tokens came, each time some came."""

    async def close(self) -> None: ...


@dataclass
class Run:
    """What one row did with one list of questions; times in seconds, one an answer."""

    seconds: float = 0.0
    tokens: int = 0
    first_token_s: list[float] = field(default_factory=list)
    each_token_s: list[float] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        return len(self.first_token_s) / self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def draw_questions(
    load: Load, popularity: str, num_adapters: int, num_questions: int, vocab_size: int, seed: Sequence[int]
) -> list[Question]:
    """Adapters uniform, or the i-th with probability proportional to i^-1.5; prompts of random tokens, so that no two
    share a prefix and no cache helps."""
    random = np.random.default_rng(seed)
    weights = np.arange(1, num_adapters + 1) ** -(ZIPF_EXPONENT if popularity == "zipf" else 0.0)
    adapters = random.choice(num_adapters, size=num_questions, p=weights / weights.sum())
    # The lowest ids are the tokenizer's special tokens.
    prompts = random.integers(100, vocab_size, (num_questions, load.prompt_tokens))
    return [Question(int(adapter), tuple(map(int, ids))) for adapter, ids in zip(adapters, prompts, strict=True)]


async def drive(row: Row, questions: Sequence[Question], answer_tokens: int, clients: int) -> Run:
    """``clients`` ask at once, each its next question as soon as its last is answered, so that requests enter and
    leave the batch at all times. Raises RuntimeError for an answer of another length: nothing is counted then."""
    run, waiting = Run(), iter(questions)

    async def client() -> None:
        for question in waiting:
            began = time.perf_counter()
            first, tokens = 0.0, 0
            async for count in row.ask(question, answer_tokens):
                first = first or time.perf_counter()
                tokens += count
            if tokens != answer_tokens:
                raise RuntimeError(f"{row.name}: an answer has {tokens} tokens, expected {answer_tokens}")
            run.tokens += tokens
            run.first_token_s.append(first - began)
            run.each_token_s.append((time.perf_counter() - first) / (tokens - 1))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    run.seconds = time.perf_counter() - began
    return run
