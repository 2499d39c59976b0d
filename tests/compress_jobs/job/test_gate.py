"""The gate that a run chooses itself: what it was judged by, what it says of it, and that it holds on other rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.bundle.export import served_factors
from cluster.bundle.reading import Bundle
from cluster.errors import ConfigError
from compress_jobs.__main__ import main
from compress_jobs.job import gate as gate_step
from compress_jobs.job import ray_cluster
from compress_jobs.job.options import AUTO
from compress_jobs.quality.gate_choice import LEVELS, PAPER
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.task import Task, read_tasks
from tests.support.jobs import copy_adapters, run_job
from tests.support.paths import ZOO
from tests.support.place import Place

with_ray = pytest.mark.usefixtures("ray_for_jobs")

NAMES = ("city-country", "past", "roman")


def half_of_the_tasks(path: Path) -> Path:
    """The rows that the gate sees; what is left of them judges it."""
    lines = [json.loads(line) for line in (ZOO / "tasks.jsonl").read_text().splitlines()]
    path.write_text("".join(json.dumps(line | {"test": line["test"][:16]}) + "\n" for line in lines))
    return path


@pytest.mark.slow
@with_ray
def test_where_the_base_cannot_be_loaded_the_papers_gate_is_taken_and_said(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generated base has weights of noise and a config that transformers does not know."""
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)
    assert place.call("run", "--gate", "auto") == 0
    printed = capsys.readouterr().out
    assert f"gate       {PAPER:g}, the paper's: no evidence of this collection (the base cannot be loaded" in printed
    method = Bundle.open(str(place.out)).manifest.method
    assert (method.gate, method.evidence, method.keep) == (PAPER, "paper", 0.99)
    assert place.call("run", "--gate", "auto") == 0
    assert "unchanged" in capsys.readouterr().out
    assert place.call("run", "--gate", "auto", "--keep", "0.9") == 0
    assert "unchanged" not in capsys.readouterr().out


@pytest.mark.slow
@with_ray
@pytest.mark.by_hand
@pytest.mark.parametrize("evidence", ["loss", "probe"])
def test_the_adapters_keep_what_was_asked_for_on_rows_that_the_gate_never_saw(
    zoo_path: Path, base_path: Path, tmp_path: Path, evidence: str
) -> None:
    """At a size where the bases hold the adapters badly, so that the gate decides."""
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", NAMES)
    asked = {"gate": AUTO, "rank": 4} | (
        {"tasks": str(half_of_the_tasks(tmp_path / "tasks.jsonl"))} if evidence == "loss" else {}
    )
    outcome = run_job(adapters, base_path, tmp_path / "out", **asked)
    manifest, summary = outcome.manifest, outcome.summary
    assert summary is not None
    assert summary.gate is not None
    assert manifest.method.evidence == evidence
    assert manifest.method.gate in LEVELS
    assert (manifest.method.tasks is not None) == (evidence == "loss")
    assert {one["adapter_id"] for one in summary.gate["judged"]} == set(NAMES)
    assert any(line.startswith(f"gate       {manifest.method.gate:g}, by") for line in summary.lines(manifest))

    bundle, scorer = Bundle.open(str(tmp_path / "out")), Scorer(str(base_path))
    run_job(adapters, base_path, tmp_path / "whole", raw=("*",))
    whole = Bundle.open(str(tmp_path / "whole"))
    kept = {}
    for name, task in read_tasks(ZOO / "tasks.jsonl", 32).items():
        if name in NAMES:
            unseen = Task(name, task.question, task.rows[16:])
            base, own = scorer.score(unseen, {}).loss, scorer.score(unseen, served_factors(whole, name)).loss
            kept[name] = (base - scorer.score(unseen, served_factors(bundle, name)).loss) / (base - own)
    assert sum(kept.values()) / len(kept) >= 0.98, kept
    assert min(kept.values()) >= 0.95, kept

    again = run_job(adapters, base_path, tmp_path / "out", **asked)
    assert again.summary is None, "the same inputs and options give what is published"
    twin = run_job(adapters, base_path, tmp_path / "twin", **asked)
    assert twin.manifest == manifest


def test_rows_for_nobody_in_the_collection_are_refused_before_any_work(place: Place, tmp_path: Path) -> None:
    tasks = half_of_the_tasks(tmp_path / "tasks.jsonl")
    with pytest.raises(ConfigError, match="none of the 6 adapters has a task of its name"):
        run_job(place.adapters, place.base, place.out, gate=AUTO, tasks=str(tasks))
    assert not place.out.exists() or not list(place.out.rglob("CURRENT"))


@pytest.mark.slow
@with_ray
def test_rows_that_cannot_be_asked_end_the_run(place: Place, tmp_path: Path) -> None:
    """They were given to judge by: another gate than they bear out would be worse than none."""
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({"name": "a0", "question": "{x}?", "test": [["1", "2"]]}) + "\n")
    with pytest.raises(ConfigError, match=r"--tasks .*cannot be judged by it: the base cannot be loaded"):
        run_job(place.adapters, place.base, place.out, gate=AUTO, tasks=str(tasks))


@pytest.mark.slow
@with_ray
def test_a_base_that_no_node_can_hold_is_not_tried(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_step, "_PROCESS_BYTES", 1 << 50)
    outcome = run_job(place.adapters, place.base, place.out, rank=2, gate=AUTO)
    assert outcome.summary is not None
    assert outcome.summary.gate is not None
    assert outcome.manifest.method.gate == PAPER
    assert "largest node" in outcome.summary.gate["reason"]


@pytest.mark.parametrize("line", ["--gate 0.3 --keep 0.9", "--gate 0.3 --tasks rows.jsonl", "--keep 1", "--gate 0"])
def test_options_that_do_not_go_together_are_refused(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--adapters", "a", "--base", "b", "--out", "c", *line.split()]) == 2
    assert "--keep" in (printed := capsys.readouterr().err) or "--tasks" in printed or "--gate" in printed
