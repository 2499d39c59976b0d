"""Rows of several adapters side by side, one after another without padding, and attention within each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

Pair = tuple[list[int], list[int]]
"""Prompt tokens and answer tokens of one row."""

ATTENTION = "within-rows"
"""The model's ``attn_implementation``."""


@dataclass(frozen=True)
class Batch:
    """Line i of n holds the tokens of adapter i: what all its prompts begin with, once, then the rest of each row.

    ``ids``, ``positions``, ``targets`` (n, L): a token, its place in its row, and the next token where that belongs
    to the answer, else -1. ``slots`` (m, W): each of the m rows by itself, for attention; which of the n * L tokens
    stands where. ``places`` (n * L,): of each token one of its slots. What fills up a line or a row has no part in any
    target, and is of the same adapter: nothing of one reaches another, be it NaN.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    slots: Tensor
    places: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(
            *(tensor.to(device) for tensor in (self.ids, self.positions, self.targets, self.slots, self.places))
        )


def make_batch(lines: Sequence[Sequence[Pair]]) -> Batch:
    """Of every adapter's rows."""
    shared = [_common_prefix(line) for line in lines]
    W = max(len(prompt) + len(answer) for line in lines for prompt, answer in line)
    L = max(
        sum(len(prompt) + len(answer) - same for prompt, answer in line) + same
        for line, same in zip(lines, shared, strict=True)
    )
    ids, positions, targets, slots, places = ([0] * 0 for _ in range(5))
    for line, same in zip(lines, shared, strict=True):
        start = len(ids)
        ids += line[0][0][:same]
        positions += range(same)
        targets += [-1] * same
        places += range(len(slots), len(slots) + same)
        first_slot = len(slots)
        for prompt, answer in line:
            end = len(prompt) + len(answer)
            places += range(len(slots) + same, len(slots) + end)
            slots += [*range(start, start + same), *range(len(ids), len(ids) + end - same), *[start] * (W - end)]
            ids += prompt[same:] + answer
            positions += range(same, end)
            targets += [-1] * (len(prompt) - 1 - same) + answer + [-1]
        fill = start + L - len(ids)
        ids += [0] * fill
        positions += [0] * fill
        targets += [-1] * fill
        places += [first_slot] * fill
    by_line = torch.tensor([ids, positions, targets]).view(3, len(lines), L)
    return Batch(by_line[0], by_line[1], by_line[2], torch.tensor(slots).view(-1, W), torch.tensor(places))


def _common_prefix(line: Sequence[Pair]) -> int:
    """How many tokens all prompts begin with, short of a prompt's last: what follows that is the row's own."""
    prompts = (prompt[:-1] for prompt, _ in line)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, scaling: float, batch: Batch, **_: Any
) -> tuple[Tensor, None]:
    """transformers' attention, (n, heads, L, d) -> (n, L, heads, d), within the rows of ``batch``.

    Written out: for some 20 tokens a row, torch's fused attention takes four times as long on a CPU.
    """
    n, heads, L, d = query.shape
    (m, W), groups = batch.slots.shape, key.shape[1]

    def by_row(x: Tensor) -> Tensor:  # (m, heads, W, d)
        tokens = x.transpose(1, 2).reshape(n * L, -1)
        return tokens.index_select(0, batch.slots.flatten()).view(m, W, -1, d).transpose(1, 2)

    # The heads that share a key stand below each other.
    queries = by_row(query).reshape(m, groups, -1, d)
    scores = (queries @ by_row(key).mT * scaling).view(m, heads, W, W)
    later = torch.ones(W, W, dtype=torch.bool, device=query.device).triu(1)
    weights = scores.float().masked_fill(later, float("-inf")).softmax(-1).to(value.dtype)
    out = (weights.view(m, groups, -1, W) @ by_row(value)).view(m, heads, W, d)
    return out.transpose(1, 2).reshape(m * W, -1).index_select(0, batch.places).view(n, L, heads, d), None


AttentionInterface.register(ATTENTION, _attend)


def answer_states(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states (k, hidden), targets (k,), lines (k,)) at the k positions that predict a token of an answer.

    The product with the vocabulary is a large part of a small model's work: nowhere else.
    """
    hidden = model.model(batch.ids, position_ids=batch.positions, use_cache=False, batch=batch).last_hidden_state
    wanted = batch.targets >= 0
    return hidden[wanted], batch.targets[wanted], wanted.nonzero()[:, 0]
