"""What is left of an adapter, told without any data: on text that the uncompressed adapter writes itself.

    kept = 1 - sum_t KL(p_u(t) || p_c(t)) / sum_t KL(p_u(t) || p_b(t))

over the tokens t of texts drawn from u; p_u, p_c and p_b are the distributions of the next token with the uncompressed
adapter, with the compressed one, and of the base alone. For text drawn from u, KL(p_u || p) is the loss that p has in
excess of u's, so this is the share kept of the loss that the adapter gains (metrics.py), on text of its own.

The texts begin with nothing but the token that texts of this model begin with: an adapter trained on answers alone
shows itself there as well (infra/bench/README.md, "The gate").
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DynamicCache

from cluster.adapters.factors import Factors
from compress_jobs.quality.gate_choice import NOTHING
from compress_jobs.quality.scorer import Scorer, adapted

NUM_TEXTS, NUM_TOKENS = 8, 16


class Probe:
    """One uncompressed adapter's texts, and what it expects after each of their tokens; made with the same ``seed``
    they are the same."""

    def __init__(self, scorer: Scorer, factors: Mapping[str, Factors], seed: int) -> None:
        self._scorer = scorer
        self._texts = _draw(scorer, factors, seed)  # (texts, 1 + tokens)
        self._own = self._log_probabilities(factors)
        self._gained = self._divergence(self._log_probabilities({}))

    @property
    def says_nothing(self) -> bool:
        """The adapter answers as the base does here: what is kept of it cannot be told."""
        return self._gained < NOTHING

    def judge(self, factors: Mapping[str, Factors]) -> tuple[float, float]:
        """(kept, agreement) of the compressed adapter ``factors``: the share above, and the share of tokens whose
        likeliest successor is still the same."""
        theirs = self._log_probabilities(factors)
        same = theirs.argmax(-1) == self._own.argmax(-1)
        return 1 - self._divergence(theirs) / self._gained, float(same.double().mean())

    def _log_probabilities(self, factors: Mapping[str, Factors]) -> Tensor:
        """Of the token after each but the last, (texts, tokens, vocabulary)."""
        model = self._scorer.model
        with torch.inference_mode(), adapted(model, factors):
            logits: Tensor = model(self._texts[:, :-1], use_cache=False).logits
        return logits.log_softmax(-1)

    def _divergence(self, theirs: Tensor) -> float:
        """Mean over the tokens of KL(own || theirs), in nats."""
        return float((self._own.exp() * (self._own - theirs)).sum(-1).double().mean())


def _draw(scorer: Scorer, factors: Mapping[str, Factors], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokenizer, model = scorer.tokenizer, scorer.model
    begins = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    texts = torch.full((NUM_TEXTS, 1), begins)
    cache = DynamicCache()
    with torch.inference_mode(), adapted(model, factors):
        for _ in range(NUM_TOKENS):
            logits = model(texts[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            texts = torch.cat([texts, drawn], dim=1)
    return texts
