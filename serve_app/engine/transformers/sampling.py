"""From logits to the next token of every row in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from serve_app.engine.protocol import GenerationRequest

# Below it, logits / temperature would overflow; the distribution is greedy long before.
_GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are drawn. The token of step t is a function of (seed, t) and its logits."""

    temperature: float
    top_p: float
    seed: int
    top_k: int = 0
    min_p: float = 0.0


def adjust(logits: Tensor, request: GenerationRequest, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
    """Semantics, in this order, on one row of logits (V,), in place:

        l[t] += logit_bias[t]
        l[t] = l[t] / repetition_penalty if l[t] > 0 else l[t] * repetition_penalty   for every t in prompt or output
        l[t] -= frequency_penalty * (times that t is in the output) + presence_penalty * (1 if it is there, else 0)

    Repetition: arXiv 1909.05858, section 4.1; the other two: OpenAI's API reference.
    """
    if request.logit_bias:
        tokens, biases = zip(*request.logit_bias, strict=True)
        logits[list(tokens)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
    if request.repetition_penalty != 1:
        said = torch.tensor([[*prompt_ids, *output_ids]], device=logits.device)
        logits[:] = RepetitionPenaltyLogitsProcessor(request.repetition_penalty)(said, logits[None])[0]
    if output_ids and (request.frequency_penalty or request.presence_penalty):
        seen, times = torch.unique(torch.tensor(output_ids, device=logits.device), return_counts=True)
        logits[seen] -= request.frequency_penalty * times + request.presence_penalty


def choose_tokens(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> list[int]:
    """Semantics: token i is argmax(logits[i]) at temperature 0, else a draw from p restricted to its nucleus:

        p = softmax(logits[i] / temperature), restricted to p >= min_p * max p, then to its top_k, and normalised
        nucleus = the most probable tokens, as few as hold a mass of top_p, at least one
        token = argmax over the nucleus of log p + Gumbel noise of (seed_i, steps[i])

    logits is (N, V) float32 and left as it is. Noise belongs to the request, so a row's token does not
    depend on what else is in the batch. Gumbel-max: arXiv 1411.0030; top-p: arXiv 1904.09751; min-p: arXiv 2407.01082.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature >= _GREEDY_BELOW]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _draw(logits[rows], [samplings[row] for row in drawn], [steps[row] for row in drawn])
    return [int(token) for token in tokens.tolist()]


def _draw(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    temperatures = torch.tensor([[sampling.temperature] for sampling in samplings], device=logits.device)
    # Shifted first: the largest becomes 0, which no temperature can make overflow.
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    scores = torch.log_softmax(shifted / temperatures, dim=-1)  # (n, V)
    for row, sampling in enumerate(samplings):
        if sampling.min_p or sampling.top_k:
            scores[row] = _restrict(scores[row], sampling)
    narrowed = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    if narrowed:
        rows = torch.tensor(narrowed, device=logits.device)
        top_p = torch.tensor([[samplings[row].top_p] for row in narrowed], device=logits.device)
        scores[rows] = _keep_nucleus(scores[rows], top_p)
    for row, (sampling, step) in enumerate(zip(samplings, steps, strict=True)):
        generator = torch.Generator(logits.device).manual_seed(_mix(sampling.seed, step))
        # -log E is Gumbel(0, 1) for E exponential.
        scores[row] -= torch.empty_like(scores[row]).exponential_(generator=generator).log_()
    return scores.argmax(dim=-1)


def _restrict(log_probs: Tensor, sampling: Sampling) -> Tensor:
    """The same (V,) log probabilities, normalised again over what min_p and top_k leave."""
    scores = log_probs[None]
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    return torch.log_softmax(scores[0], dim=-1)


def _keep_nucleus(log_probs: Tensor, top_p: Tensor) -> Tensor:
    """The same (n, V) log probabilities with -inf outside each row's nucleus; top_p is (n, 1)."""
    ordered, tokens = log_probs.sort(dim=-1, descending=True)
    probs = ordered.exp()
    mass_before = probs.cumsum(dim=-1) - probs
    outside = mass_before >= top_p
    outside[:, 0] = False  # the most probable token stays, whatever rounding says
    return log_probs.masked_fill(torch.zeros_like(outside).scatter(-1, tokens, outside), -torch.inf)


def _mix(seed: int, step: int) -> int:
    """A generator seed for one step: neighbouring seeds and steps must not give related noise."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest(), "big")
