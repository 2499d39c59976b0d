"""What is said of a trained adapter: how well it answers, and how near to low rank it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.adapters.factors import Factors
from cluster.compression.svd import svd_factors


@dataclass(frozen=True)
class Batch:
    """``ids`` (rows, length), padded on the right; ``targets`` likewise: the next token where it belongs to
    the answer, else -1."""

    ids: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.targets.to(device))


def make_batch(pairs: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """From (prompt tokens, answer tokens) of each row."""
    length = max(len(prompt) + len(answer) for prompt, answer in pairs)
    ids = torch.zeros(len(pairs), length, dtype=torch.long)
    targets = torch.full_like(ids, -1)
    for row, (prompt, answer) in enumerate(pairs):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return Batch(ids, targets)


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits (n, vocabulary), targets (n,)) at the n positions that predict a token of an answer.

    The product with the vocabulary is the larger part of a small model's work: nowhere else.
    """
    hidden = model.model(batch.ids, use_cache=False).last_hidden_state
    wanted = batch.targets >= 0
    return model.lm_head(hidden[wanted]), batch.targets[wanted]


@torch.inference_mode()
def score(model: Any, batch: Batch) -> tuple[float, float]:
    """(loss, exact match): the mean over the answers' tokens; the share of rows whose every answer token is
    the most likely one, which is what greedy decoding would give."""
    logits, targets = answer_logits(model, batch)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    missed = torch.zeros_like(batch.targets, dtype=torch.bool)
    missed[batch.targets >= 0] = logits.argmax(1) != targets
    return float(losses.double().mean()), float((~missed.any(1)).double().mean())


def truncation_error(modules: Iterable[Factors], rank: int) -> float:
    """sum_m ||M_m - svd_rank(M_m)||^2 / sum_m ||M_m||^2: what is lost when every module is cut to ``rank``."""
    spectra = [svd_factors(A, B)[1].square() for A, B in modules]
    return math.fsum(float(s[rank:].sum()) for s in spectra) / math.fsum(float(s.sum()) for s in spectra)
