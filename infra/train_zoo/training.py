"""Train several adapters side by side in one batch, and measure each as it is stored."""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.adapters.base import read_base
from infra.train_zoo.batch import ATTENTION, Batch, Pair, answer_states, make_batch
from infra.train_zoo.lora import StackedLora, in_place, stack_on
from infra.train_zoo.measure import score, truncation_errors
from infra.train_zoo.plan import AdapterPlan
from infra.train_zoo.stored import Folders, Record, write_adapter
from infra.train_zoo.task import Row, Task, subset_rows

BATCH_ROWS = 8  # of each adapter; a step costs a CPU in proportion
CLIP_NORM = 1.0
TRUNCATION_RANKS = (1, 2, 4)


@dataclass(frozen=True)
class Base:
    """A model whose own weights are not trained; ``scores`` remembers its (loss, exact match) by task."""

    name: str
    model: Any
    tokenizer: Any
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)

    def tokens(self, task: Task, rows: Sequence[Row]) -> list[Pair]:
        """Prompt and answer are tokenised apart, as compress_jobs.quality.evaluate does."""
        prompts = self.tokenizer([task.prompt(x) for x, _ in rows]).input_ids
        answers = self.tokenizer([f" {y}\n" for _, y in rows]).input_ids
        return list(zip(prompts, answers, strict=True))

    def batch(self, lines: Sequence[Sequence[Pair]]) -> Batch:
        return make_batch(lines).to(self.model.device)


def load_base(folder: str, dtype: torch.dtype) -> Base:
    """With weights and activations in ``dtype``; on the GPU where there is one."""
    torch.set_float32_matmul_precision("high")  # TF32 where there is any
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
    model.requires_grad_(False).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Base(read_base(folder).name, model, AutoTokenizer.from_pretrained(folder))


@functools.cache
def loaded_base(folder: str, dtype: torch.dtype) -> Base:
    """The one of this process: a Ray worker keeps it for all of its tasks."""
    return load_base(folder, dtype)


def train_adapters(
    plans: Sequence[AdapterPlan], tasks: Mapping[str, Task], base: Base, folders: Folders
) -> tuple[list[Record], list[str]]:
    """Train all ``plans``, of one number of steps and one learning rate, in one batch; store them in bfloat16.

    Every adapter has rows, a loss and a gradient of its own: what is trained beside it changes roundings alone.
    Factors and optimizer are in float32. Seeded: the same bytes from the same plans, base, versions, device kind and
    thread count. Loss and exact match are of the adapter as stored, computed in the base's dtype. Answers with the
    records of those that were written, and with what is wrong with each of the others.
    """
    began, began_cpu = time.monotonic(), time.process_time()
    held_out, train = _rows(plans, tasks, base)
    new = [name for name in held_out if name not in base.scores]
    if new:
        base.scores.update(zip(new, score(base.model, base.batch([held_out[name] for name in new])), strict=True))
    stacked = stack_on(base.model, [plan.shape for plan in plans], [plan.seed for plan in plans])
    with in_place(base.model, stacked):
        norms = _train(plans, base, train, list(stacked.values()))
        _round_to_stored(list(stacked.values()))
        scores = score(base.model, base.batch([held_out[plan.task] for plan in plans]))
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - began_cpu

    records, failed = [], []
    for i, plan in enumerate(plans):
        bad = (~norms[:, i].isfinite()).nonzero().flatten().tolist()
        if bad:
            gradient = float(norms[bad[0], i])
            failed.append(f"adapter {plan.adapter_id}: gradient {gradient} at step {bad[0]}; lower the rate")
            continue
        factors = {
            name: module.of(i, plan.shape.rank)
            for name, module in stacked.items()
            if name.rpartition(".")[2] in plan.shape.modules
        }
        errors = truncation_errors(factors.values(), TRUNCATION_RANKS)
        record = {
            "name": plan.adapter_id,
            "family": tasks[plan.task].family,
            "task": plan.task,
            "subset": plan.subset,
            "train_rows": len(train[i]),
            "r": plan.shape.rank,
            "alpha": plan.shape.alpha,
            "modules": list(plan.shape.modules),
            "rslora": plan.shape.rslora,
            "seed": plan.seed,
            "steps": plan.steps,
            "learning_rate": plan.learning_rate,
            "base_loss": round(base.scores[plan.task][0], 4),
            "base_em": round(base.scores[plan.task][1], 4),
            "lora_loss": round(scores[i][0], 4),
            "lora_em": round(scores[i][1], 4),
            "svd_error": {str(rank): round(error, 4) for rank, error in errors.items()},
            "device": base.model.device.type,
            "dtype": str(base.model.dtype).removeprefix("torch."),
            # Each has an equal share of the time of all.
            "together": len(plans),
            "seconds": round(seconds / len(plans), 1),
            "cpu_seconds": round(cpu_seconds / len(plans), 1),
        }
        write_adapter(plan, folders, record, factors, base.name)
        records.append(record)
    return records, failed


def _rows(
    plans: Sequence[AdapterPlan], tasks: Mapping[str, Task], base: Base
) -> tuple[dict[str, list[Pair]], list[list[Pair]]]:
    """Held-out rows by task, and training rows by plan, as tokens."""
    held_out, train = {}, {}
    for name in dict.fromkeys(plan.task for plan in plans):
        test_rows, train_rows = tasks[name].split()
        held_out[name], train[name] = base.tokens(tasks[name], test_rows), base.tokens(tasks[name], train_rows)
    return held_out, [subset_rows(train[plan.task], plan.subset) for plan in plans]


def _train(
    plans: Sequence[AdapterPlan], base: Base, train: Sequence[Sequence[Pair]], stacked: Sequence[StackedLora]
) -> Tensor:
    """Changes the factors; answers with the norms (steps, n) of the gradients before they are clipped."""
    ((steps, learning_rate),) = {(plan.steps, plan.learning_rate) for plan in plans}
    parameters = [factor for module in stacked for factor in (module.A, module.B)]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    epochs = [_epochs(len(rows), plan.seed) for rows, plan in zip(train, plans, strict=True)]
    norms = []
    for _ in range(steps):
        batch = base.batch([[rows[row] for row in next(order)] for rows, order in zip(train, epochs, strict=True)])
        hidden, targets, owners = answer_states(base.model, batch)
        losses = torch.nn.functional.cross_entropy(base.model.lm_head(hidden).float(), targets, reduction="none")
        # The sum over adapters of the mean over each one's tokens.
        (losses / owners.bincount()[owners]).sum().backward()  # type: ignore[no-untyped-call]
        norms.append(_clip(parameters))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return torch.stack(norms).cpu()


@torch.no_grad()
def _clip(parameters: Sequence[Tensor]) -> Tensor:
    """clip_grad_norm_ for every adapter by itself, over all of its factors; answers with the norms (n,)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms: Tensor = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    shares = (CLIP_NORM / (norms + 1e-6)).clamp(max=1).view(-1, 1, 1)
    for gradient in gradients:
        gradient.mul_(shares)
    return norms


def _epochs(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Batches of row indices for ever, every epoch in a new order; an epoch's last rows may stay out."""
    generator = random.Random(seed)
    order = list(range(num_rows))
    size = min(BATCH_ROWS, num_rows)
    while True:
        generator.shuffle(order)
        for start in range(0, num_rows - size + 1, size):
            yield order[start : start + size]


@torch.no_grad()
def _round_to_stored(stacked: Sequence[StackedLora]) -> None:
    """Every factor takes a value that bfloat16 has."""
    for module in stacked:
        for factor in (module.A, module.B):
            factor.copy_(factor.to(torch.bfloat16))
