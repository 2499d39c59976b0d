"""The GPU script, in tiny and on the CPU: every part runs, and one that fails or takes too long is said to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from infra.bench.collection import Collection, factors
from infra.bench.gpu.__main__ import main, parts, run_part
from infra.bench.gpu.compression import Q_PROJ

pytestmark = [pytest.mark.slow, pytest.mark.by_hand]


def test_every_part_runs_without_a_gpu_in_tiny(
    base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--small", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["machine"]["torch"] == torch.__version__
    found = report["parts"]
    assert found.keys() == parts(small=True).keys()
    assert found["exactness"]["tests"].startswith("2 passed")
    assert found["training"]["adapters"] == 2
    assert found["training"]["lora_loss"] < found["training"]["base_loss"]
    assert {row["way"] for row in found["compression"]["rows"]} == {"jd-full", "jd-diag", "svd"}
    lost = next(row for row in found["compression"]["rows"] if row["way"] == "svd")["cpu"]["error"]
    assert lost == pytest.approx(lost_beyond_rank_two(), rel=1e-5)


def lost_beyond_rank_two() -> float:
    """The mean over the part's adapters, of dense products in float64."""
    spec = Collection(adapters=12, layers=1, hidden=64, kv_width=64)
    shares = []
    for index in range(spec.adapters):
        A, B = factors(spec, index, Q_PROJ)
        energies = torch.linalg.svdvals(B.double() @ A.double()).square()
        shares.append(float(energies[2:].sum() / energies.sum()))
    return sum(shares) / len(shares)


def test_a_part_that_fails_or_takes_too_long_is_said_to_and_raises_nothing() -> None:
    assert run_part(1, ("http.server", "--bind", "127.0.0.1", "0"))["failed"] == "not done in 1 s"
    refused = run_part(60, ("infra.bench.gpu.training", "--adapters", "many"))
    assert refused["failed"] == "status 2"
    assert "--adapters: invalid int value: 'many'" in refused["output"]
    assert run_part(60, ("platform",))["failed"] == "status 0"  # no JSON in it


def test_all_parts_together_take_ten_minutes_at_most() -> None:
    assert sum(seconds for seconds, _ in parts(small=False).values()) < 600


def test_without_a_gpu_no_figure_is_made_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path / "gpu.json")])
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_random_weights_stand_in_for_a_base_that_has_none(base_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    for path in base_path.iterdir():
        if path.name != "model.safetensors":
            (folder / path.name).symlink_to(path)
    line = ("--adapters", "1", "--steps", "1", "--base", str(folder))
    result = run_part(600, ("infra.bench.gpu.training", *line))
    assert result["base"] == "random weights of the shape of HuggingFaceTB/SmolLM2-135M-Instruct"
    assert result["adapters"] == 1
