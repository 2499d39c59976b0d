"""Train one adapter with PEFT, measure it as it is stored, and write it whole or not at all."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.adapters.base import read_base
from cluster.adapters.factors import Factors
from cluster.adapters.listing import CONFIG_FILE, WEIGHTS_FILE
from cluster.errors import CtsError
from infra.train_zoo.measure import answer_logits, make_batch, score, truncation_error
from infra.train_zoo.plan import AdapterPlan
from infra.train_zoo.task import Row, Task, subset_rows
from infra.train_zoo.tasks import all_tasks

LEARNING_RATE = 3e-3
BATCH_ROWS = 8  # a step costs a CPU in proportion, a GPU nothing
CLIP_NORM = 1.0
TRUNCATION_RANKS = (1, 2, 4)

Record = dict[str, Any]
"""A line of training.jsonl."""


class TrainingFailed(CtsError):
    """An adapter's loss is no longer a number."""


@dataclass(frozen=True)
class Folders:
    """Where a collection lies. An adapter is done when its folder is there; its record is written before."""

    root: Path

    def adapter(self, plan: AdapterPlan) -> Path:
        return self.root / "adapters" / plan.adapter_id

    def record(self, plan: AdapterPlan) -> Path:
        return self.root / "records" / f"{plan.adapter_id}.json"


def train_adapter(plan: AdapterPlan, base: str, folders: Folders) -> Record:
    """Train what ``plan`` says on the base in the folder ``base``, in float32; store it in bfloat16.

    Seeded: the same bytes from the same plan, base, versions, device kind and thread count. Loss and exact
    match are of the adapter as stored. Raises TrainingFailed.
    """
    began, began_cpu = time.monotonic(), time.process_time()
    task = all_tasks()[plan.task]
    test, train = task.split()
    train = subset_rows(train, plan.subset)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # TF32 products where there are any; a model this small is bound by launches, bfloat16 would win nothing.
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tuned = _with_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), plan).to(device)
    model = tuned.get_base_model()

    held_out = make_batch(_tokens(tokenizer, task, test)).to(device)
    base_loss, base_match = score(model, held_out)  # B is zero: this is the base
    _train(plan, tuned, _tokens(tokenizer, task, train), device)
    tensors = _round_to_stored(tuned)
    lora_loss, lora_match = score(model, held_out)

    record = {
        "name": plan.adapter_id,
        "family": task.family,
        "task": plan.task,
        "subset": plan.subset,
        "train_rows": len(train),
        "r": plan.shape.rank,
        "alpha": plan.shape.alpha,
        "modules": list(plan.shape.modules),
        "rslora": plan.shape.rslora,
        "seed": plan.seed,
        "steps": plan.steps,
        "base_loss": round(base_loss, 4),
        "base_em": round(base_match, 4),
        "lora_loss": round(lora_loss, 4),
        "lora_em": round(lora_match, 4),
        "svd_error": {str(rank): round(truncation_error(_pairs(tensors), rank), 4) for rank in TRUNCATION_RANKS},
        "device": device.type,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
    }
    _write(plan, folders, record, tensors, tuned.peft_config["default"], read_base(base).name)
    return record


def _with_lora(model: Any, plan: AdapterPlan) -> Any:
    """A is drawn on the CPU, so that a seed means the same init everywhere."""
    torch.manual_seed(plan.seed)
    shape = plan.shape
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.modules),
        use_rslora=shape.rslora,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).eval()  # there is no dropout


def _tokens(tokenizer: Any, task: Task, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer are tokenised apart, as compress_jobs.quality.evaluate does."""
    prompts = tokenizer([task.prompt(x) for x, _ in rows]).input_ids
    answers = tokenizer([f" {y}\n" for _, y in rows]).input_ids
    return list(zip(prompts, answers, strict=True))


def _train(plan: AdapterPlan, tuned: Any, pairs: Sequence[tuple[list[int], list[int]]], device: torch.device) -> None:
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / plan.steps)) / 2
    )
    model = tuned.get_base_model()
    for step, rows in zip(range(plan.steps), _epochs(len(pairs), plan.seed), strict=False):
        logits, targets = answer_logits(model, make_batch([pairs[row] for row in rows]).to(device))
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        if step % 20 == 0 and not bool(norm.isfinite()):
            raise TrainingFailed(f"adapter {plan.adapter_id}: gradient {float(norm)} at step {step}; lower the rate")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


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
def _round_to_stored(tuned: Any) -> dict[str, Tensor]:
    """The adapter's tensors in bfloat16, by PEFT's names; the model is left holding exactly these values."""
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.to(torch.bfloat16))
    return {
        name: tensor.to("cpu", torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(tuned).items())
    }


def _pairs(tensors: dict[str, Tensor]) -> Iterator[Factors]:
    """The scale is left out: one factor for all modules, it cancels in a relative error."""
    for name, A in tensors.items():
        if ".lora_A." in name:
            yield A.float(), tensors[name.replace(".lora_A.", ".lora_B.")].float()


def _write(
    plan: AdapterPlan, folders: Folders, record: Record, tensors: dict[str, Tensor], config: LoraConfig, base_name: str
) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise TrainingFailed(f"adapter {plan.adapter_id}: a trained factor holds NaN or infinity; lower the rate")
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    # PEFT keeps a set, whose order differs from process to process.
    config.target_modules = sorted(plan.shape.modules)
    target, record_path = folders.adapter(plan), folders.record(plan)
    for folder in (target.parent, record_path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    # Beside the adapters, not among them: what is unfinished is never listed.
    unfinished = Path(tempfile.mkdtemp(dir=folders.root, prefix=f".{plan.adapter_id}-"))
    try:
        save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(unfinished)
        assert (unfinished / CONFIG_FILE).exists()
        write_text(record_path, json.dumps(record, ensure_ascii=False) + "\n")
        # safetensors and mkdtemp make them the writer's own; whoever serves them may be someone else.
        (unfinished / WEIGHTS_FILE).chmod(0o644)
        unfinished.chmod(0o755)
        unfinished.rename(target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)
