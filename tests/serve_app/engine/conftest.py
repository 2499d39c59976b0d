"""The oracle of both engines: PEFT on the real base and the real adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.engines import CUT, DEVICE, PROMPTS, write_cut


@pytest.fixture(scope="module")
def tokenizer(base_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def oracle(
    base_path: Path, zoo_path: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, list[int]]:
    """Adapter -> the 24 tokens that PEFT generates greedily after its prompt (the base's own under None)."""
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).to(DEVICE)
    folders = {name: zoo_path / name for name in PROMPTS if name is not None}
    for name, rank in CUT.items():
        folders[name] = tmp_path_factory.mktemp("cut") / name
        write_cut(zoo_path / name, rank, folders[name])
    names = list(folders)
    model = PeftModel.from_pretrained(base, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)

    def greedy(prompt: str) -> list[int]:
        inputs = tokenizer(prompt, return_tensors="pt").to(DEVICE)
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        return output[0, inputs["input_ids"].shape[1] :].tolist()

    tokens: dict[str | None, list[int]] = {}
    for name in names:
        model.set_adapter(name)
        tokens[name] = greedy(PROMPTS[name])
    with model.disable_adapter():
        tokens[None] = greedy(PROMPTS[None])
    return tokens
