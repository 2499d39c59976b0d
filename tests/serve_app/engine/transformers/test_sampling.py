"""Sampling against the definition of temperature and top-p, and against exact probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from serve_app.engine.protocol import GenerationRequest
from serve_app.engine.transformers.sampling import Sampling, adjust, choose_tokens

NUM_DRAWS = 8000


def exact_probs(
    logits: list[float], temperature: float, top_p: float, top_k: int = 0, min_p: float = 0.0
) -> list[float]:
    """By the definition, in Python floats: of those that min_p and then top_k leave, renormalised, the fewest most
    probable tokens that hold top_p, renormalised."""
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    weights = [weight if weight >= min_p else 0.0 for weight in weights]
    least = sorted(weights, reverse=True)[:top_k][-1] if top_k else 0.0
    weights = [weight if weight >= least else 0.0 for weight in weights]
    probs = [weight / sum(weights) for weight in weights]
    kept, mass = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if mass >= top_p:
            break
        kept.add(token)
        mass += probs[token]
    return [prob / mass if token in kept else 0.0 for token, prob in enumerate(probs)]


def draw(logits: list[float], sampling: Sampling, num_draws: int = NUM_DRAWS) -> list[int]:
    rows = torch.tensor(logits).expand(num_draws, -1).clone()
    return choose_tokens(rows, [sampling] * num_draws, list(range(num_draws)))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        *((1.0, 1.0, 0, 0.0), (0.5, 1.0, 0, 0.0), (2.0, 1.0, 0, 0.0), (1.0, 0.8, 0, 0.0), (0.7, 0.6, 0, 0.0)),
        *((1.0, 1.0, 3, 0.0), (1.0, 1.0, 20, 0.0), (1.0, 1.0, 0, 0.4), (2.0, 1.0, 0, 0.4), (1.0, 0.5, 4, 0.3)),
    ],
)
def test_tokens_follow_the_distribution(temperature: float, top_p: float, top_k: int, min_p: float) -> None:
    logits = [1.5, 0.2, -0.7, 1.1, 0.0, -2.0, 0.9, 0.4]
    expected = exact_probs(logits, temperature, top_p, top_k, min_p)
    tokens = draw(logits, Sampling(temperature, top_p, 11, top_k, min_p))
    counts = torch.bincount(torch.tensor(tokens), minlength=len(logits)).tolist()
    assert all(count == 0 for count, prob in zip(counts, expected, strict=True) if prob == 0)
    chi_square = sum(
        (count - prob * NUM_DRAWS) ** 2 / (prob * NUM_DRAWS)
        for count, prob in zip(counts, expected, strict=True)
        if prob > 0
    )
    # Seven degrees of freedom at most: one in 2000 good samplers is beyond 26, and this one is seeded.
    assert chi_square < 26


def test_bias_and_penalties_are_what_their_definitions_say_in_their_order() -> None:
    logits = [1.0, -1.0, 0.5, 2.0, -2.0, 0.25]
    prompt, output, bias = [0, 1, 0], [1, 3, 3], {0: 0.5, 4: 3.0}
    request = GenerationRequest(
        "id",
        None,
        logit_bias=tuple(bias.items()),
        repetition_penalty=1.5,
        frequency_penalty=0.25,
        presence_penalty=-0.5,
    )
    expected = []
    for token, logit in enumerate(logits):
        logit += bias.get(token, 0.0)
        if token in prompt or token in output:
            logit = logit / 1.5 if logit > 0 else logit * 1.5
        if token in output:
            logit -= 0.25 * output.count(token) - 0.5
        expected.append(logit)
    rows = torch.tensor([logits, logits])
    adjust(rows[0], request, prompt, output)
    assert rows[0].tolist() == pytest.approx(expected)
    adjust(rows[1], GenerationRequest("id", None), prompt, output)
    assert rows[1].tolist() == logits


def test_other_seeds_and_other_steps_draw_otherwise() -> None:
    logits = [0.0] * 1000
    by_step = draw(logits, Sampling(1.0, 1.0, seed=1), 64)
    assert len(set(by_step)) > 50
    assert by_step != draw(logits, Sampling(1.0, 1.0, seed=2), 64)
    # Step 1 of seed 1 is not step 0 of seed 2, as it would be if the two were only added.
    assert by_step[1:] != draw(logits, Sampling(1.0, 1.0, seed=2), 64)[:-1]


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=generator)
    samplings = [
        Sampling(0.0, 1.0, 1), Sampling(0.9, 0.5, 2), Sampling(1.3, 1.0, 3),
        Sampling(0.9, 0.9, 4), Sampling(0.0, 0.3, 5), Sampling(0.2, 1.0, 6),
    ]  # fmt: skip
    steps = [0, 5, 17, 3, 2, 9]
    together = choose_tokens(logits, samplings, steps)
    alone = [choose_tokens(logits[i : i + 1], samplings[i : i + 1], steps[i : i + 1])[0] for i in range(6)]
    assert together == alone


def test_temperature_zero_is_greedy_and_ignores_the_seed() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3))
    greedy = logits.argmax(dim=-1).tolist()
    for seed in range(3):
        assert choose_tokens(logits, [Sampling(0.0, 0.4, seed)] * 4, [seed] * 4) == greedy


@pytest.mark.parametrize("sampling", [Sampling(1e-4, 1.0, 1), Sampling(1e-300, 1.0, 1), Sampling(5.0, 1e-9, 1)])
def test_the_narrowest_sampling_is_greedy(sampling: Sampling) -> None:
    assert set(draw([80.0, -3.0, 79.5, 0.0], sampling, 200)) == {0}


def test_a_forbidden_token_is_never_drawn() -> None:
    tokens = draw([5.0, -math.inf, 0.0, 0.0], Sampling(3.0, 1.0, seed=1), 2000)
    assert set(tokens) == {0, 2, 3}


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    before = logits.clone()
    choose_tokens(logits, [Sampling(1.0, 0.5, 1), Sampling(0.0, 1.0, 1), Sampling(1.0, 1.0, 1)], [0, 0, 0])
    assert torch.equal(logits, before)
