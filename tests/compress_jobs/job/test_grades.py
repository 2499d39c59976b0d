"""Who is on a basis, who stands alone, what that costs and what would change it; and that `plan` knew."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from compress_jobs.__main__ import main
from compress_jobs.job import ray_cluster
from infra.bench.collection import Collection, write
from tests.support.jobs import current_manifest

pytestmark = pytest.mark.usefixtures("ray_for_jobs")

FLAT = Collection(adapters=48, layers=1, hidden=192, kv_width=96, rank=16)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters whose spectra fall slowly, as long training leaves them."""
    root = tmp_path_factory.mktemp("flat") / "made"
    write(FLAT, root)
    return root


@pytest.fixture(autouse=True)
def connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)


def run(flat: Path, out: Path, *more: str) -> list[str]:
    return ["run", "--adapters", str(flat / "adapters"), "--base", str(flat / "base"), "--out", str(out), *more]


OPTIONS = (
    "--clusters 3 --rank 16 --gate 1",
    "--clusters 3 --rank 16 --gate 0.35",
    "--method svd --rank 16",
    "--clusters 3 --rank 16 --gate 0.1",
    "--clusters 1 --rank 32 --gate 0.3",
    "--clusters 2 --rank 16 --gate 0.5 --method jd-diag",
    "--method svd --rank 4",
    "--clusters 3 --rank 16 --gate 0.4 --dtype float32",
)


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS[1:3],
        *(pytest.param(line, marks=[pytest.mark.slow, pytest.mark.by_hand]) for line in (OPTIONS[0], *OPTIONS[3:])),
    ],
)
def test_a_run_takes_the_bytes_that_plan_said(
    flat: Path, tmp_path: Path, options: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--adapters", str(flat / "adapters"), "--base", str(flat / "base"), "--device-memory", "1GiB"]
    assert main(["plan", *source, *options.split()]) == 0
    printed = capsys.readouterr().out
    planned = json.loads(printed.splitlines()[-1])["run"]
    assert f"{planned['on_basis']} on a basis, {planned['truncated']} truncated" in printed

    assert main(run(flat, tmp_path / "out", *options.split())) == 0
    manifest = current_manifest(tmp_path / "out")
    size = sum(entry["size_bytes"] for entry in manifest["objects"].values())
    headers = 130 * len(manifest["objects"]) * 6  # of the objects' files: what a tensor's name and place take
    assert size == pytest.approx(planned["size_bytes"], rel=0.1, abs=headers)
    errors = [adapter["error"] for adapter in manifest["adapters"].values()]
    assert sum(errors) / len(errors) == pytest.approx(planned["error"], rel=0.15, abs=1e-3)


def test_where_many_stand_alone_the_first_lines_say_what_it_costs_and_what_would_change_it(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(flat, tmp_path / "out", "--clusters", "3", "--rank", "16", "--gate", "0.15")) == 0
    warning, change = capsys.readouterr().out.splitlines()[:2]
    manifest = current_manifest(tmp_path / "out")
    alone = [a for a in manifest["adapters"].values() if a["mode"] != "core"]
    size = sum(manifest["objects"][a["factors"]]["size_bytes"] for a in alone)
    told = f"{len(alone)} of 48 adapters meant for a basis stand alone, beyond the gate of 0.15: {size:,} of the "
    assert warning.startswith(f"warning    {told}")
    assert "--rank 32 " in change
    assert "--clusters 6 " in change

    option = shlex.split(change)[1:3]
    assert option[0] == "--gate"
    assert main(run(flat, tmp_path / "more", "--clusters", "3", "--rank", "16", *option)) == 0
    kept = [a for a in current_manifest(tmp_path / "more")["adapters"].values() if a["mode"] == "core"]
    assert len(kept) >= 0.9 * 48
    assert not capsys.readouterr().out.startswith("warning")


def test_a_basis_with_too_few_left_on_it_is_dissolved(
    flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run(flat, tmp_path / "all", "--clusters", "3", "--rank", "16", "--gate", "1")) == 0
    adapters = current_manifest(tmp_path / "all")["adapters"]
    capsys.readouterr()
    errors = sorted((adapter["error"], adapter_id) for adapter_id, adapter in adapters.items())
    (first, best), gate = errors[0], (errors[1][0] + errors[2][0]) / 2
    assert first < gate
    assert main(run(flat, tmp_path / "out", "--clusters", "3", "--rank", "16", "--gate", str(gate))) == 0
    manifest = current_manifest(tmp_path / "out")
    assert manifest["clusters"] == {}
    assert manifest["adapters"][best]["mode"] == "truncated"
    assert manifest["adapters"][best]["error"] <= gate
    assert "dissolved  2 of them met the gate" in capsys.readouterr().out


def test_a_whole_cluster_stays_however_small(tmp_path: Path) -> None:
    few = tmp_path / "few"
    write(replace(FLAT, adapters=3), few)
    assert main(run(few, tmp_path / "out", "--clusters", "3", "--rank", "4", "--gate", "1")) == 0
    assert len(current_manifest(tmp_path / "out")["clusters"]) == 3
