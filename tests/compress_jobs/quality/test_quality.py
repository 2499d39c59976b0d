"""Quality on real adapters: the manifest's errors and the evaluation's figures, each measured another way."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress_jobs.__main__ import main
from tests.support.jobs import FEW, copy_adapters, current_manifest, dense_error, dense_served, rewrite, run_job
from tests.support.paths import REPOSITORY, ZOO

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_for_jobs")]

# The larger collection that the shipped adapters are taken from, where it lies beside the repository.
FULL_ZOO = REPOSITORY.parent / "shared" / "zoo"


@pytest.mark.by_hand
@pytest.mark.parametrize("zoo", [ZOO, FULL_ZOO], ids=["shipped", "full"])
def test_errors_of_a_whole_collection_are_those_of_a_dense_reconstruction(
    zoo: Path, base_path: Path, tmp_path: Path
) -> None:
    if not zoo.exists():
        pytest.skip("the full zoo does not lie beside this repository")
    outcome = run_job(zoo / "adapters", base_path, tmp_path / "out", clusters=4, rank=16)
    manifest = current_manifest(tmp_path / "out")
    assert len(manifest["adapters"]) == len(list((zoo / "adapters").iterdir()))
    for adapter_id, adapter in manifest["adapters"].items():
        dense = dense_error(zoo / "adapters" / adapter_id, dense_served(tmp_path / "out", manifest, adapter_id))
        assert adapter["error"] == pytest.approx(dense, abs=1e-3), adapter_id
    sizes = [cluster["num_slots"] for cluster in manifest["clusters"].values()]
    assert max(sizes) <= math.ceil(1.25 * len(manifest["adapters"]) / 4)
    assert outcome.summary is not None


def peft_loss(base_path: Path, folder: Path | None, rows: list[tuple[str, str]]) -> float:
    """Mean loss of the answers' tokens, one row at a time through PEFT and transformers' own loss."""
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder)
    total, count = 0.0, 0
    for prompt, answer in rows:
        prompt_ids, answer_ids = tokenizer(prompt).input_ids, tokenizer(answer).input_ids
        labels = torch.tensor([[-100] * len(prompt_ids) + answer_ids])
        with torch.inference_mode():
            loss = model(input_ids=torch.tensor([prompt_ids + answer_ids]), labels=labels).loss
        total, count = total + float(loss) * len(answer_ids), count + len(answer_ids)
    return total / count


@pytest.mark.by_hand
def test_the_evaluation_says_what_peft_says_of_base_adapter_and_export(
    base_path: Path, zoo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:3])
    copied = "models/smollm2-copy"  # the base's name, to one of them
    rewrite(adapters / FEW[0], base_model_name_or_path=copied)
    run_job(adapters, base_path, tmp_path / "out", rank=6, accept_base=(copied,))
    line = ["evaluate", str(tmp_path / "out"), "--adapters", str(adapters), "--base", str(base_path), "--rows", "4"]
    line += ["--tasks", str(ZOO / "tasks.jsonl")]
    rewrite(adapters / FEW[0], base_model_name_or_path="another/name")
    assert main(line) == 2
    assert "--accept-base 'another/name'" in capsys.readouterr().err
    rewrite(adapters / FEW[0], base_model_name_or_path=copied)
    assert main(line) == 0  # as the run accepted it
    *table, last = capsys.readouterr().out.splitlines()
    means = json.loads(last)
    assert means["adapters"] == 3
    losses: dict[str, list[float]] = {"base": [], "uncompressed": [], "served": []}
    for name in FEW[:3]:
        task = next(t for t in map(json.loads, (ZOO / "tasks.jsonl").read_text().splitlines()) if t["name"] == name)
        rows = [(f"Q: {task['question'].format(x=x)}\nA:", f" {y}\n") for x, y in task["test"][:4]]
        assert main(["export", str(tmp_path / "out"), "--adapter", name, "--to", str(tmp_path / name)]) == 0
        for variant, folder in (("base", None), ("uncompressed", adapters / name), ("served", tmp_path / name)):
            losses[variant].append(peft_loss(base_path, folder, rows))
        assert any(row.startswith(name) for row in table)
    for variant, values in losses.items():
        assert means[variant]["loss"] == pytest.approx(sum(values) / 3, rel=1e-4)
    assert 0 < means["svd_equal_bytes"]["loss"] < means["base"]["loss"]
    assert means["uncompressed"]["agreement"] == 1
    assert means["base"]["agreement"] < means["served"]["agreement"] <= 1
    assert means["base"]["rouge_l"] < means["served"]["rouge_l"] <= 1
    assert {figure["mean"] for figure in means["uncompressed"]["relative"].values()} == {1.0}
    assert means["base"]["relative"]["loss"] == {"mean": 0, "worst": 0, "spread": 0, "num_adapters": 3}
    loss = means["served"]["over_adapters"]["loss"]
    assert loss["worst"] == pytest.approx(max(losses["served"]), rel=1e-3)
    assert loss["spread"] == pytest.approx(statistics.pstdev(losses["served"]), rel=1e-2)
