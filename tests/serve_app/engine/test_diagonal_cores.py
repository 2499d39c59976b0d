"""Diagonal cores (JD-Diag) from bundle to answer and to export, on real adapters.

The bundle is lossless and written without the compressor (``support/bundles.py``): an export must be the adapter again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.bundle.export import export_adapter
from cluster.bundle.reading import Bundle
from serve_app.engine.protocol import GenerationRequest
from serve_app.engine.revisions import Revision
from serve_app.engine.transformers.engine import TransformersEngine
from serve_app.engine.transformers.settings import EngineSettings
from tests.support.bundles import read_factors, write_bundle

# Rank 8, and rank 16 with another alpha; the full cores of a second cluster and the base run in the same batch.
CLUSTERS = {"0": ("number-en", "roman"), "1": ("past", "first-letter")}
DIAGONAL = CLUSTERS["0"]
PROMPTS = {
    "number-en": "Q: 450 in English words?\nA:",
    "roman": "Q: 48 as a Roman numeral?\nA:",
    "past": "Q: Past tense of harrow?\nA:",
    None: "The capital of France is",
}
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def bundle(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("diagonal")
    clusters = {name: {adapter: zoo_path / adapter for adapter in members} for name, members in CLUSTERS.items()}
    write_bundle(out, base_path, clusters, {}, diagonal=["0"])
    return Bundle.open(str(out))


@pytest.fixture(scope="module")
def exported(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for adapter in DIAGONAL:
        export_adapter(bundle, adapter, folder / adapter)
    return folder


@pytest.fixture(scope="module")
def engine(base_path: Path, bundle: Bundle) -> Iterator[TransformersEngine]:
    settings = EngineSettings(max_batch=4, max_model_len=64, num_threads=2)
    served = bundle.serving_map
    engine = TransformersEngine(base_path, Revision(0, served, tuple(served.homes()), bundle.load_home), settings)
    asyncio.run(engine.start())
    assert set(engine.health().revisions[0].homes.values()) == {"ready"}
    yield engine
    asyncio.run(engine.stop())


def answer(engine: TransformersEngine, *adapters: str | None) -> list[list[int]]:
    """Greedy, all in one batch."""

    async def collect(adapter: str | None) -> list[int]:
        prompt = PROMPTS[adapter]
        request = GenerationRequest(
            str(adapter), adapter, prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
        )
        return [token async for chunk in engine.generate(request) for token in chunk.token_ids]

    async def gather() -> list[list[int]]:
        return await asyncio.gather(*map(collect, adapters))

    return asyncio.run(gather())


def peft_answers(base_path: Path, folders: dict[str, Path]) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    base.generation_config.eos_token_id = None
    answers = []
    for adapter, folder in folders.items():
        model = PeftModel.from_pretrained(base, folder)
        inputs = tokenizer(PROMPTS[adapter], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
        model.unload()
    return answers


def test_a_bundle_hands_out_diagonal_cores_as_vectors(bundle: Bundle) -> None:
    for weights in bundle.load_home("cluster:0").weights.values():
        assert weights.cores is not None
        assert weights.cores.shape == (2, 8 + 16)
        assert weights.U.shape[1] == weights.V.shape[1] == 8 + 16


@pytest.mark.slow
def test_answers_through_diagonal_cores_are_pefts_with_the_export_alone_and_beside_full_cores(
    base_path: Path, exported: Path, engine: TransformersEngine
) -> None:
    expected = peft_answers(base_path, {adapter: exported / adapter for adapter in DIAGONAL})
    assert expected[0] != expected[1]
    assert [answer(engine, adapter)[0] for adapter in DIAGONAL] == expected
    alone = [answer(engine, adapter)[0] for adapter in ("past", None)]
    assert answer(engine, *DIAGONAL, "past", None) == [*expected, *alone]


def test_an_export_of_diagonal_cores_is_the_adapter_it_was_made_of(zoo_path: Path, exported: Path) -> None:
    for adapter in DIAGONAL:
        original, back = read_factors(zoo_path / adapter), read_factors(exported / adapter)
        assert back.keys() == original.keys()
        for module, (A, B) in original.items():
            torch.testing.assert_close(back[module][1] @ back[module][0], B @ A, rtol=1e-4, atol=1e-5)
