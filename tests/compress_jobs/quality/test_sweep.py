"""The scorer against transformers' own generation, and a small sweep against figures measured another way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.adapters.base import read_base
from cluster.adapters.layout import Layout
from cluster.compression.methods import METHODS
from compress_jobs.__main__ import main
from compress_jobs.quality.collection import (
    Collection,
    compress_jointly,
    read_collection,
    truncate_to_bytes,
    truncate_to_rank,
)
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.sweep import Setting, settings
from compress_jobs.quality.task import Task, read_tasks
from tests.support.jobs import copy_adapters, dense_modules
from tests.support.paths import ZOO

NAMES = ("number-en", "city-country", "past")  # rank 8, rank 4 on q/v only, rank 8
NUM_ROWS = 3


@pytest.fixture(scope="module")
def adapters_path(zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_adapters(zoo_path, tmp_path_factory.mktemp("adapters"), NAMES)


@pytest.fixture(scope="module")
def collection(adapters_path: Path, base_path: Path) -> Collection:
    return read_collection(str(adapters_path), read_base(str(base_path)), Layout())


@pytest.fixture(scope="module")
def scorer(base_path: Path) -> Scorer:
    return Scorer(str(base_path))


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return read_tasks(ZOO / "tasks.jsonl", NUM_ROWS)


def merged_generate(scorer: Scorer, adapter: Path, prompts: list[str]) -> list[str]:
    """By transformers' generate, with the adapter merged into the weights, a prompt at a time."""
    model, tokenizer = scorer.model, scorer.tokenizer
    deltas = {module: torch.from_numpy(M).float() for module, M in dense_modules(adapter).items()}
    texts = []
    with torch.inference_mode():
        for module, delta in deltas.items():
            model.get_submodule(module).weight += delta
        try:
            for prompt in prompts:
                batch = tokenizer(prompt, return_tensors="pt")
                output = model.generate(
                    **batch, max_new_tokens=24, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer
                )
                new = output[0, batch.input_ids.shape[1] :]
                texts.append(tokenizer.decode(new, skip_special_tokens=True).split("\n", 1)[0])
        finally:
            for module, delta in deltas.items():
                model.get_submodule(module).weight -= delta
    return texts


def test_batched_generation_is_that_of_transformers_one_by_one(
    scorer: Scorer, collection: Collection, adapters_path: Path, tasks: dict[str, Task]
) -> None:
    task = tasks["city-country"]
    prompts = [task.prompt("Meknes"), task.prompt("Stratford-upon-Avon")]  # of unlike length: one is padded
    ours = scorer.generate(prompts, collection.adapters["city-country"])
    assert ours == merged_generate(scorer, adapters_path / "city-country", prompts)
    assert all(text.strip() for text in ours)


def test_drafts_and_teacher_forcing_change_the_cost_not_the_answers(
    scorer: Scorer, collection: Collection, tasks: dict[str, Task]
) -> None:
    task, poor = tasks["past"], truncate_to_rank(collection.adapters, 1).factors["past"]
    plain = scorer.generate([task.prompt(x) for x, _ in task.rows], poor)
    own = scorer.answer(task, collection.adapters["past"])
    for drafts in ((), own.texts, ("nonsense",) * NUM_ROWS, tuple(plain)):
        assert list(scorer.answer(task, poor, drafts).texts) == plain
    assert own.exact == tuple(text == f" {y}" for text, (_, y) in zip(own.texts, task.rows, strict=True))


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 0, 1]])
def test_errors_and_bytes_of_what_is_compressed_in_memory(
    collection: Collection, adapters_path: Path, labels: list[int]
) -> None:
    compressed = compress_jointly(collection, np.array(labels), METHODS["jd-full"], 4, seed=0)
    elements = 0
    for module in collection.stacks:
        for cluster in set(labels):
            members = [name for name, own in zip(sorted(NAMES), labels, strict=True) if own == cluster]
            touching = [name for name in members if module in collection.adapters[name]]
            if touching:
                B, A = collection.adapters[touching[0]][module][1], collection.adapters[touching[0]][module][0]
                elements += 4 * (A.shape[1] + B.shape[0]) + len(members) * 16
    assert compressed.size_bytes == 2 * elements
    svd = truncate_to_bytes(collection.adapters, compressed.size_bytes)
    assert svd.size_bytes <= compressed.size_bytes
    assert svd.size_bytes > compressed.size_bytes - 2 * (576 + 576)  # not another component would fit
    for variant in (compressed, svd):
        for name in NAMES:
            served, lost, total = variant.factors[name], 0.0, 0.0
            for module, M in dense_modules(adapters_path / name).items():
                A, B = served.get(module, (torch.zeros(1, M.shape[1]), torch.zeros(M.shape[0], 1)))
                lost += float(np.square(M - B.double().numpy() @ A.double().numpy()).sum())
                total += float(np.square(M).sum())
            assert variant.errors[name] == pytest.approx(lost / total, rel=1e-5)


def test_settings_are_every_combination_and_svd_has_no_clusters() -> None:
    assert settings(["jd-full", "svd"], [2, 4], [1, 3]) == [
        *(Setting("jd-full", rank, k) for rank in (2, 4) for k in (1, 3)),
        Setting("svd", 2, None),
        Setting("svd", 4, None),
    ]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--methods", "jd-none", "unknown"),
        ("--ranks", "0", "at least 1"),
        ("--clusters", "2,-1", "at least 1"),
        ("--rows", "0", "at least 1"),
        ("--clusters", "4", "more than the 3 adapters"),
        ("--tasks", "nowhere.jsonl", "No such file"),
    ],
)
def test_wrong_options_are_refused_by_name(
    option: str, value: str, message: str, adapters_path: Path, base_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "--adapters": str(adapters_path),
        "--base": str(base_path),
        "--tasks": str(ZOO / "tasks.jsonl"),
    } | {option: value}
    assert main(["sweep", *(part for pair in given.items() for part in pair)]) == 2
    said = capsys.readouterr().err
    assert option in said
    assert message in said


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_sweep_measures_every_setting_and_leaves_its_rows_as_data(
    adapters_path: Path, base_path: Path, scorer: Scorer, collection: Collection, tmp_path: Path,
    tasks: dict[str, Task], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "results" / "rows.jsonl"
    line = f"sweep --adapters {adapters_path} --base {base_path} --tasks {ZOO / 'tasks.jsonl'} --methods jd-full,svd"
    line += f" --ranks 40 --clusters 1 --rows {NUM_ROWS} --out {out}"
    assert main(line.split()) == 0
    references, joint, svd, curves = map(json.loads, out.read_text().splitlines())
    assert all(row["command"].startswith("python -m compress_jobs sweep --adapters") for row in (joint, svd))
    assert (joint["method"], joint["rank"], joint["clusters"]) == ("jd-full", 40, 1)
    assert (svd["method"], svd["clusters"]) == ("svd", None)
    # At full rank nothing is lost, by either method: every relative figure is 1.
    for row in (joint["compressed"], joint["svd_equal_bytes"], svd["compressed"]):
        assert row["error_worst"] < 1e-3
        for figure in row["relative"].values():
            assert figure["mean"] == pytest.approx(1, abs=0.02)
            assert figure["num_adapters"] == 3
    for name in NAMES:
        loss = scorer.score(tasks[name], collection.adapters[name]).loss
        assert references["uncompressed"][name]["loss"] == pytest.approx(loss, abs=1e-5)
        assert references["uncompressed"][name]["agreement"] == 1
        assert references["base"][name]["loss"] > references["uncompressed"][name]["loss"]
    assert curves["curves"]["joint"]["rouge_l"]["bins"][0]["num_points"] == 3
    table: list[Any] = [row for row in capsys.readouterr().out.splitlines() if row.startswith(("jd-full", "svd"))]
    assert len(table) == 2
