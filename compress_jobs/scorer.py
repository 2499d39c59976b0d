"""The base model answering held-out questions, with an adapter added to its linear layers by hooks.

A row's prompt is ``Q: {question}\\nA:`` and its answer `` {answer}\\n``, the form the shipped adapters were trained in.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from cluster.adapter import Factors
from cluster.errors import ConfigError

MAX_NEW_TOKENS = 16  # or as many as the task's longest answer has


@dataclass(frozen=True)
class Task:
    """Held-out rows of one adapter: ``question`` with {x}, and (x, answer) pairs."""

    name: str
    question: str
    rows: tuple[tuple[str, str], ...]

    def prompt(self, x: str) -> str:
        return f"Q: {self.question.format(x=x)}\nA:"


def read_tasks(path: Path, num_rows: int) -> dict[str, Task]:
    """Tasks by adapter id, from JSON lines with name, question and test rows. Raises ConfigError."""
    if num_rows < 1:
        raise ConfigError(f"--rows {num_rows}: expected at least 1")
    try:
        documents = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        tasks = [Task(d["name"], d["question"], tuple((x, y) for x, y in d["test"][:num_rows])) for d in documents]
    except OSError as error:
        raise ConfigError(f"--tasks {path}: {error.strerror}; give a file of JSON lines") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--tasks {path}: {error!r}; expected JSON lines with name, question and test") from None
    for task in tasks:
        if not task.rows:
            raise ConfigError(f"--tasks {path}: task {task.name!r} has no test rows; add some, or remove the task")
    return {task.name: task for task in tasks}


@dataclass(frozen=True)
class Answers:
    """What one variant of an adapter does on a task's rows.

    ``loss``: mean over the answers' tokens, given the prompt. ``exact``: whether greedy decoding produces exactly
    the row's answer (every token of it is the most likely one). ``texts``: the greedy output up to its newline.
    """

    loss: float
    exact: tuple[bool, ...]
    texts: tuple[str, ...]


class Scorer:
    """The base model in float32. ``base`` is a local folder."""

    def __init__(self, base: str) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(base)
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        end = self.model.generation_config.eos_token_id
        self._ends = set(end if isinstance(end, list) else [end])

    def answer(self, task: Task, factors: Mapping[str, Factors]) -> Answers:
        """Loss, exact matches and greedy outputs of all rows; ``factors`` empty is the base alone."""
        answers = [self.tokenizer(f" {y}\n").input_ids for _, y in task.rows]
        loss, exact = self.force(task, factors)
        max_tokens = max(MAX_NEW_TOKENS, *map(len, answers))
        # Where teacher forcing has found an exact match, greedy decoding gives the answer: nothing to generate.
        texts = [self._text(answer) for answer in answers]
        wrong = [row for row, hit in enumerate(exact) if not hit]
        generated = self.generate([task.prompt(task.rows[row][0]) for row in wrong], factors, max_tokens)
        for row, text in zip(wrong, generated, strict=True):
            texts[row] = text
        return Answers(loss, exact, tuple(texts))

    def force(self, task: Task, factors: Mapping[str, Factors]) -> tuple[float, tuple[bool, ...]]:
        """Teacher forcing, all rows in one batch padded on the right: ``loss`` and ``exact`` of Answers."""
        prompts = [self.tokenizer(task.prompt(x)).input_ids for x, _ in task.rows]
        answers = [self.tokenizer(f" {y}\n").input_ids for _, y in task.rows]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        targets = torch.full_like(ids, -1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            # Position p predicts token p + 1.
            targets[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
        wanted = targets >= 0
        with torch.inference_mode(), _adapted(self.model, factors):
            hidden = self.model.model(ids, use_cache=False).last_hidden_state
            # The product with the vocabulary is the larger part: only where an answer stands.
            logits = self.model.lm_head(hidden[wanted]).float()
        losses = torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="none")
        wrong = torch.zeros(wanted.shape, dtype=torch.bool)
        wrong[wanted] = logits.argmax(1) != targets[wanted]
        return float(losses.double().mean()), tuple((~wrong.any(1)).tolist())

    def generate(self, prompts: Sequence[str], factors: Mapping[str, Factors], max_tokens: int) -> list[str]:
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
        with torch.inference_mode(), _adapted(self.model, factors):
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
def _adapted(model: Any, factors: Mapping[str, Factors]) -> Iterator[None]:
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
