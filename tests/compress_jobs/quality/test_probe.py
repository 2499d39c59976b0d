"""The probe against the same figure by PEFT and dense distributions in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cluster.adapters.base import read_base
from cluster.adapters.layout import Layout
from compress_jobs.quality import probe
from compress_jobs.quality.collection import Compressed, read_collection, truncate_to_rank
from compress_jobs.quality.probe import Probe
from compress_jobs.quality.scorer import Scorer
from tests.support.jobs import copy_adapters

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

NAME = "roman"


def test_the_share_that_is_kept_is_the_divergence_by_peft(
    zoo_path: Path, base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the adapter itself all, of the base nothing, of two truncations what dense softmaxes say; the texts are drawn
    from the adapter, and the same again."""
    monkeypatch.setattr(probe, "NUM_TEXTS", 3)
    monkeypatch.setattr(probe, "NUM_TOKENS", 6)
    folder = copy_adapters(zoo_path, tmp_path / "adapters", (NAME,))
    own = read_collection(str(folder), read_base(str(base_path)), Layout()).adapters
    cuts: list[Compressed] = [truncate_to_rank(own, rank) for rank in (1, 2)]
    scorer = Scorer(str(base_path))
    probed = Probe(scorer, own[NAME], seed=7)
    assert torch.equal(probed._texts, Probe(scorer, own[NAME], seed=7)._texts)
    assert not torch.equal(probed._texts, Probe(scorer, own[NAME], seed=8)._texts)
    assert probed.judge(own[NAME]) == (1.0, 1.0)
    assert probed.judge({})[0] == pytest.approx(0.0, abs=1e-6)
    assert Probe(scorer, {}, seed=7).says_nothing

    texts = probed._texts
    with torch.inference_mode():
        base = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32).eval()
        at_base = base(texts[:, :-1]).logits.double().softmax(-1)
        tuned = PeftModel.from_pretrained(base, folder / NAME).eval()
        expected = tuned(texts[:, :-1]).logits.double().softmax(-1)

        def divergence(theirs: torch.Tensor) -> float:
            return float((expected * (expected / theirs).log()).sum())

        layers = {m.removeprefix("base_model.model."): layer for m, layer in tuned.named_modules() if "lora" not in m}
        for cut in cuts:
            for module, (A, B) in cut.factors[NAME].items():
                layer = layers[module]
                rank = layer.lora_A["default"].weight.shape[0]
                # A rank that holds it, with PEFT's own scale taken out.
                layer.lora_A["default"].weight.data = torch.zeros(rank, A.shape[1])
                layer.lora_A["default"].weight.data[: A.shape[0]] = A
                layer.lora_B["default"].weight.data = torch.zeros(B.shape[0], rank)
                layer.lora_B["default"].weight.data[:, : A.shape[0]] = B / layer.scaling["default"]
            theirs = tuned(texts[:, :-1]).logits.double()
            kept, agreement = probed.judge(cut.factors[NAME])
            assert kept == pytest.approx(1 - divergence(theirs.softmax(-1)) / divergence(at_base), abs=1e-3)
            same = theirs.argmax(-1) == expected.argmax(-1)
            assert agreement == pytest.approx(float(same.double().mean()))
