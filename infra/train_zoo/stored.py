"""A collection's folders, and an adapter written to them whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from cluster.adapters.factors import Factors
from cluster.adapters.listing import CONFIG_FILE, WEIGHTS_FILE
from infra.train_zoo.plan import AdapterPlan

Record = dict[str, Any]
"""A line of training.jsonl."""


@dataclass(frozen=True)
class Folders:
    """Where a collection lies. An adapter is done when its folder is there; its record is written before."""

    root: Path

    def adapter(self, plan: AdapterPlan) -> Path:
        return self.root / "adapters" / plan.adapter_id

    def record(self, plan: AdapterPlan) -> Path:
        return self.root / "records" / f"{plan.adapter_id}.json"


def write_adapter(
    plan: AdapterPlan, folders: Folders, record: Record, factors: Mapping[str, Factors], base_name: str
) -> None:
    """A PEFT folder with ``factors`` (module -> A, B, the scale not in them) in bfloat16, and its record."""
    config = LoraConfig(
        r=plan.shape.rank,
        lora_alpha=plan.shape.alpha,
        target_modules=list(plan.shape.modules),
        use_rslora=plan.shape.rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    # PEFT makes it a set, whose order differs from process to process.
    config.target_modules = sorted(plan.shape.modules)
    tensors = {
        f"base_model.model.{module}.lora_{letter}.weight": factor.to(torch.bfloat16).contiguous()
        for module, pair in sorted(factors.items())
        for letter, factor in zip("AB", pair, strict=True)
    }
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
