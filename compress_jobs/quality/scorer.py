"""The base model answering held-out questions, with an adapter added to its linear layers by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cluster.adapters.factors import Factors
from compress_jobs.quality.task import Task

MAX_NEW_TOKENS = 24


@dataclass(frozen=True)
class Answers:
    """What one variant of an adapter does on a task's rows.

    ``loss``: mean over the answers' tokens, given the prompt. ``exact``: whether greedy decoding produces exactly
    the row's answer (every token of it is the most likely one). ``texts``: the greedy output up to its newline.
    """

    loss: float
    exact: tuple[bool, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Forced:
    """What teacher forcing alone tells: ``loss`` as in Answers, and the share of rows that are exact."""

    loss: float
    exact_match: float


class Scorer:
    """The base model in float32. ``base`` is a local folder."""

    def __init__(self, base: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        end = self.model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def score(self, task: Task, factors: Mapping[str, Factors]) -> Forced:
        """Loss and exact match without generating anything."""
        losses, exact = self.force([task.prompt(x) for x, _ in task.rows], [f" {y}\n" for _, y in task.rows], factors)
        return Forced(float(torch.cat(losses).mean()), sum(exact) / len(exact))

    def answer(self, task: Task, factors: Mapping[str, Factors], drafts: Sequence[str] = ()) -> Answers:
        """Loss, exact matches and greedy outputs of all rows; ``factors`` empty is the base alone.

        ``drafts``: outputs that are likely, one a row, of another variant; they change the cost, not the answers.
        """
        prompts = [task.prompt(x) for x, _ in task.rows]
        answers = [f" {y}\n" for _, y in task.rows]
        # Teacher forcing tells for one forward pass whether a text is the greedy output; few are left to generate.
        drafted = {row: f"{draft}\n" for row, draft in enumerate(drafts) if f"{draft}\n" != answers[row]}
        losses, exact = self.force(
            prompts + [prompts[row] for row in drafted], answers + list(drafted.values()), factors
        )
        losses, exact, draft_exact = losses[: len(answers)], exact[: len(answers)], exact[len(answers) :]
        known = {row: answers[row] for row, hit in enumerate(exact) if hit}
        known |= {row: draft for (row, draft), hit in zip(drafted.items(), draft_exact, strict=True) if hit}
        unknown = [row for row in range(len(answers)) if row not in known]
        generated = self.generate([prompts[row] for row in unknown], factors)
        known |= dict(zip(unknown, generated, strict=True))
        texts = tuple(known[row].split("\n", 1)[0] for row in range(len(answers)))
        return Answers(float(torch.cat(losses).mean()), exact, texts)

    def force(
        self, prompts: Sequence[str], texts: Sequence[str], factors: Mapping[str, Factors]
    ) -> tuple[list[Tensor], tuple[bool, ...]]:
        """Teacher forcing, one batch padded on the right. A row's losses by token of its text (float64), and whether
        the text is what greedy decoding gives (every token of it is the most likely one)."""
        encoded = [self.tokenizer(prompt).input_ids for prompt in prompts]
        wanted = [self.tokenizer(text).input_ids for text in texts]
        length = max(len(prompt) + len(text) for prompt, text in zip(encoded, wanted, strict=True))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        scored = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (prompt, text) in enumerate(zip(encoded, wanted, strict=True)):
            ids[row, : len(prompt) + len(text)] = torch.tensor(prompt + text)
            # Position p predicts token p + 1.
            scored[row, len(prompt) - 1 : len(prompt) + len(text) - 1] = True
        targets = torch.tensor([token for text in wanted for token in text])
        with torch.inference_mode(), adapted(self.model, factors):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            # The product with the vocabulary is the larger part: only where a text stands.
            logits = self.model.lm_head(hidden[scored])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none").double()
        lengths = [len(text) for text in wanted]
        hits = torch.split(logits.argmax(1) == targets, lengths)
        return list(torch.split(losses, lengths)), tuple(bool(row.all()) for row in hits)

    def generate(
        self, prompts: Sequence[str], factors: Mapping[str, Factors], max_tokens: int = MAX_NEW_TOKENS
    ) -> list[str]:
        """Greedy outputs up to the newline, the end token or ``max_tokens``: one batch, padded on the left."""
        if not prompts:
            return []
        encoded = [self.tokenizer(prompt).input_ids for prompt in prompts]
        length = max(map(len, encoded))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, own in enumerate(encoded):
            ids[row, length - len(own) :] = torch.tensor(own)
            mask[row, length - len(own) :] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache()
        outputs: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        with torch.inference_mode(), adapted(self.model, factors):
            for _ in range(max_tokens):
                hidden = self.model.model(
                    ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
                ).last_hidden_state
                chosen = self.model.lm_head(hidden[:, -1]).argmax(1)
                for row in sorted(running):
                    token = int(chosen[row])
                    outputs[row].append(token)
                    if token in self._ends or "\n" in self.tokenizer.decode([token]):
                        running.remove(row)
                if not running:
                    break
                ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
                mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        return list(map(self._text, outputs))

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.split("\n", 1)[0]


@contextlib.contextmanager
def adapted(model: Any, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Within, every module y = W x of ``factors`` answers y + B A x."""
    handles = []
    for module, (A, B) in factors.items():

        def add(_: Any, inputs: tuple[Tensor], output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
            return output + inputs[0] @ A.T @ B.T

        handles.append(model.get_submodule(module).register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
