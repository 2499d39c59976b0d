"""What is said of a trained adapter: how well it answers, and how near it is to low rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from cluster.adapters.factors import Factors
from cluster.compression.svd import svd_factors
from infra.train_zoo.batch import Batch, answer_states


@torch.inference_mode()
def score(model: Any, batch: Batch) -> list[tuple[float, float]]:
    """(loss, exact match) of each line: the mean over the answers' tokens; the share of rows whose every answer token
    is the most likely one, which is what greedy decoding would give."""
    hidden, targets, owners = answer_states(model, batch)
    row = batch.places.view(batch.ids.shape)[batch.targets >= 0] // batch.slots.shape[1]
    scores = []
    for line in range(len(batch.ids)):  # one at a time: the logits of all of them would be GBs
        own = owners == line
        logits = model.lm_head(hidden[own]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets[own], reduction="none")
        missed = set(row[own][logits.argmax(1) != targets[own]].tolist())
        scores.append((float(losses.double().mean()), 1 - len(missed) / len(set(row[own].tolist()))))
    return scores


def truncation_errors(modules: Iterable[Factors], ranks: Sequence[int]) -> dict[int, float]:
    """Rank -> sum_m ||M_m - svd_rank(M_m)||^2 / sum_m ||M_m||^2: what is lost when every module is cut to it."""
    spectra = [svd_factors(A, B)[1].square() for A, B in modules]
    whole = math.fsum(float(s.sum()) for s in spectra)
    return {rank: math.fsum(float(s[rank:].sum()) for s in spectra) / whole for rank in ranks}
