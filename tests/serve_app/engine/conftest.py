"""The oracle of both engines: PEFT on the real base and the real adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.engines import CUT, DEVICE, PROMPTS, WISHED_TOKENS, WISHES, write_cut


@pytest.fixture(scope="module")
def tokenizer(base_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def peft(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> PeftModel:
    """With every adapter of ``PROMPTS``."""
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).to(DEVICE)
    folders = {name: zoo_path / name for name in PROMPTS if name is not None}
    for name, rank in CUT.items():
        folders[name] = tmp_path_factory.mktemp("cut") / name
        write_cut(zoo_path / name, rank, folders[name])
    names = list(folders)
    model = PeftModel.from_pretrained(base, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    return model


def speaking_as(peft: PeftModel, adapter: str | None) -> Any:
    if adapter is None:
        return peft.disable_adapter()
    peft.set_adapter(adapter)
    return nullcontext()


@pytest.fixture(scope="module")
def oracle(peft: PeftModel, tokenizer: Any) -> dict[str | None, list[int]]:
    """Adapter -> the 24 tokens that PEFT generates greedily after its prompt (the base's own under None)."""
    tokens: dict[str | None, list[int]] = {}
    for name, prompt in PROMPTS.items():
        inputs = tokenizer(prompt, return_tensors="pt").to(DEVICE)
        with speaking_as(peft, name):
            output = peft.generate(**inputs, max_new_tokens=24, do_sample=False)
        tokens[name] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


@pytest.fixture(scope="module")
def wished(peft: PeftModel, tokenizer: Any) -> dict[str | None, list[int]]:
    """Adapter -> ``WISHED_TOKENS`` times the most probable token, under what ``WISHES`` does to the logits."""
    return {name: list(_wished(peft, tokenizer, name, **options)) for name, options in WISHES.items()}


@torch.inference_mode()
def _wished(
    peft: PeftModel,
    tokenizer: Any,
    adapter: str | None,
    logit_bias: tuple[tuple[int, float], ...] = (),
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    ignore_eos: bool = False,
) -> Iterator[int]:
    prompt: list[int] = tokenizer(PROMPTS[adapter])["input_ids"]
    said: list[int] = []
    while len(said) < WISHED_TOKENS:
        with speaking_as(peft, adapter):
            logits = peft(input_ids=torch.tensor([prompt + said], device=DEVICE)).logits[0, -1].tolist()
        for token, bias in logit_bias:
            logits[token] += bias
        for token in {*prompt, *said}:
            logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
        for token in set(said):
            logits[token] -= frequency_penalty * said.count(token) + presence_penalty
        said.append(max(range(len(logits)), key=logits.__getitem__))
        yield said[-1]
        if said[-1] == tokenizer.eos_token_id and not ignore_eos:
            return
