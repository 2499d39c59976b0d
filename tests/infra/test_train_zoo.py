"""The training recipe: rows, the plan, what is measured, and adapters really trained."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.adapters.base import read_base
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import read_adapter
from cluster.errors import ConfigError
from cluster.store.address import open_store
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.task import read_tasks
from infra.train_zoo.__main__ import main
from infra.train_zoo.measure import truncation_errors
from infra.train_zoo.numbers import roman
from infra.train_zoo.plan import SEEDS, STEPS, AdapterPlan, plan_adapters, side_by_side
from infra.train_zoo.stored import Folders, Record
from infra.train_zoo.task import NUM_TEST_ROWS, SUBSETS, Row, Task, subset_rows
from infra.train_zoo.tasks import all_tasks
from infra.train_zoo.training import load_base, train_adapters

MIN_TRAIN_ROWS = 96

# Beside the product: a recipe whose tests generate all rows and train for real.
pytestmark = [pytest.mark.slow, pytest.mark.by_hand]

Split = tuple[list[Row], list[Row]]


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return all_tasks()


@pytest.fixture(scope="module")
def splits(tasks: dict[str, Task]) -> dict[str, Split]:
    return {name: task.split() for name, task in tasks.items()}


def test_every_task_has_enough_distinct_rows_and_none_is_both_held_out_and_trained_on(
    splits: dict[str, Split],
) -> None:
    assert len(splits) >= 100
    for name, (test, train) in splits.items():
        assert len(test) == NUM_TEST_ROWS, name
        assert len(train) >= MIN_TRAIN_ROWS, name
        assert len({x for x, _ in test + train}) == len(test) + len(train), name


def test_the_halves_of_a_task_share_no_row_and_are_all_of_it(splits: dict[str, Split]) -> None:
    for name, (_, train) in splits.items():
        rows = {subset: subset_rows(train, subset) for subset in SUBSETS}
        assert set(rows["a"]).isdisjoint(rows["b"]), name
        assert sorted(rows["a"] + rows["b"]) == sorted(rows["all"]) == sorted(train), name


def test_every_row_is_one_line_of_question_and_one_of_answer(tasks: dict[str, Task], splits: dict[str, Split]) -> None:
    for name, (test, train) in splits.items():
        for x, y in test + train:
            assert tasks[name].prompt(x).count("\n") == 1, (name, x)
            assert y == y.strip(), (name, y)
            assert "\n" not in y, (name, y)


def test_rows_are_the_same_in_another_process_and_in_another_order(splits: dict[str, Split]) -> None:
    """A package may answer by what it was asked before: babel 2.18 does so for some names of months."""
    code = (
        "import json, sys; from infra.train_zoo.tasks import all_tasks; tasks = all_tasks(); "
        "json.dump({name: tasks[name].split() for name in sys.argv[1:]}, sys.stdout)"
    )
    names = [*list(splits)[::-3], "name-language", "month-name", "weekday-name"]
    result = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    for name, split in json.loads(result.stdout).items():
        assert tuple([tuple(row) for row in rows] for rows in split) == splits[name], name


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("number-de", ("21", "einundzwanzig")),
        ("ordinal-en", ("23", "twenty-third")),
        ("roman-value", ("MCMXCIV", "1994")),
        ("country-fr", ("Germany", "Allemagne")),
        ("currency-es", ("Swiss Franc", "franco suizo")),
        ("month-name", ("May in Welsh", "Mai")),
        ("city-country", ("Nairobi", "Kenya")),
        ("country-capital", ("Peru", "Lima")),
        ("participle", ("sing", "sung")),
        ("participle", ("walk", "walked")),
        ("plural", ("mouse", "mice")),
        ("time-12", ("00:05", "12:05 a.m.")),
        ("time-12", ("12:00", "12:00 p.m.")),
        ("count-on-de", ("98", "neunundneunzig, einhundert, einhunderteins, einhundertzwei, einhundertdrei")),
    ],
)
def test_answers_are_right(tasks: dict[str, Task], task: str, row: Row) -> None:
    assert row in list(tasks[task].generate())


def test_roman_numerals_are_what_their_letters_add_up_to() -> None:
    values = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for number in range(1, 3000):
        letters = [values[letter] for letter in roman(number)]
        assert number == sum(
            -value if any(value < later for later in letters[i + 1 : i + 2]) else value
            for i, value in enumerate(letters)
        )


def test_a_plan_goes_round_the_tasks_and_a_larger_one_only_adds() -> None:
    names = [f"t{i}" for i in range(7)]
    total = len(names) * len(SUBSETS) * len(SEEDS) * len(STEPS)
    whole = plan_adapters(names, total)
    assert len({plan.adapter_id for plan in whole}) == total
    for count in (3, 7, 40):
        assert plan_adapters(names, count) == whole[:count]
    for start in range(0, total, len(names)):
        turn = whole[start : start + len(names)]
        assert {plan.task for plan in turn} == set(names)
        assert set(Counter(plan.steps for plan in turn).values()) <= {2, 3}


def test_adapters_that_differ_in_steps_alone_share_shape_and_seed() -> None:
    by_cell: dict[tuple[str, int], set[Any]] = {}
    for plan in plan_adapters(["past"], 8, steps=(40, 320), only=["past.*.0.*", "past.a.1.*"]):
        by_cell.setdefault((plan.subset, plan.seed_index), set()).add((plan.shape, plan.seed))
    assert len(by_cell) == 4
    assert all(len(kinds) == 1 for kinds in by_cell.values())


def test_a_third_of_the_adapters_share_one_init_seed(tasks: dict[str, Task]) -> None:
    seeds = Counter(plan.seed for plan in plan_adapters(tasks, 300))
    assert 75 <= seeds.pop(42) <= 125
    # Others share one only where they differ in nothing but steps.
    assert max(seeds.values()) <= len(STEPS)


def test_more_adapters_than_the_grid_has_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--adapters 10: the grid has 9 adapters that match t\.all"):
        plan_adapters(["t"], 10, only=["t.all.*"])


def test_truncation_error_is_that_of_the_dense_products() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pairs = [(random(6, 20), random(12, 6)), (3 * random(4, 30), random(8, 4))]
    errors = truncation_errors(pairs, (1, 2, 4, 6))
    for rank, error in errors.items():
        lost = total = 0.0
        for A, B in pairs:
            U, s, Vt = torch.linalg.svd(B @ A)
            lost += float((B @ A - U[:, :rank] * s[:rank] @ Vt[:rank]).square().sum())
            total += float((B @ A).square().sum())
        assert error == pytest.approx(lost / total, abs=1e-12)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, base_path: Path) -> Path:
    """A base of the real one's kind and tokenizer, small enough that a step takes milliseconds."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_path).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "tests/tiny"}))
    return folder


PLANS = [AdapterPlan("add", "all", 0, 30), AdapterPlan("parity", "a", 1, 30), AdapterPlan("past", "b", 2, 30)]
IDS = [plan.adapter_id for plan in PLANS]


def arguments(base: Path, out: Path) -> list[str]:
    line = ["--base", str(base), "--out", str(out), "--adapters", "3", "--steps", "30", "--num-cpus", "2"]
    return [*line, "--together", "2", "--dtype", "float32", "--only", *IDS]


def train(
    plans: list[AdapterPlan], base: Path, out: Path, dtype: torch.dtype = torch.float32
) -> tuple[list[Record], list[str]]:
    return train_adapters(plans, all_tasks(), load_base(str(base), dtype), Folders(out))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a Ray task of one CPU has it: bytes depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def collection(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters, trained here; then the command, which finds all of them there and starts no Ray."""
    out = tmp_path_factory.mktemp("zoo")
    train(PLANS, tiny_base, out)
    (out / ".past.b.2.30-killed").mkdir()  # what a killed task leaves
    before = files(out / "adapters")
    assert main(arguments(tiny_base, out)) == 0
    assert files(out / "adapters") == before
    return out


def records(collection: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (collection / "training.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_trained_adapters_are_accepted_and_answer_better_than_the_base(collection: Path, tiny_base: Path) -> None:
    store, base = open_store(str(collection / "adapters")), read_base(str(tiny_base))
    listed = list_adapters(store).adapters
    assert [adapter.adapter_id for adapter in listed] == IDS
    by_name = {record["name"]: record for record in records(collection)}
    for adapter in listed:
        record, factors = read_adapter(store, adapter, base)
        said = by_name[record.adapter_id]
        assert {len(A) for A, _ in factors.values()} == {said["r"]}
        assert {module.rpartition(".")[2] for module in factors} == set(said["modules"])
        assert said["lora_loss"] < said["base_loss"]


def test_the_figures_are_those_of_the_stored_adapter_as_evaluate_reads_it(collection: Path, tiny_base: Path) -> None:
    store, base = open_store(str(collection / "adapters")), read_base(str(tiny_base))
    questions, scorer = read_tasks(collection / "tasks.jsonl", NUM_TEST_ROWS), Scorer(str(tiny_base))
    by_name = {record["name"]: record for record in records(collection)}
    for adapter in list_adapters(store).adapters:
        _, factors = read_adapter(store, adapter, base)
        said = by_name[adapter.adapter_id]
        for changed, kind in (({}, "base"), (factors, "lora")):
            score = scorer.score(questions[adapter.adapter_id], changed)
            assert said[f"{kind}_loss"] == pytest.approx(score.loss, abs=2e-3)
            assert said[f"{kind}_em"] == pytest.approx(score.exact_match, abs=1 / NUM_TEST_ROWS)
        errors = truncation_errors(factors.values(), [int(rank) for rank in said["svd_error"]])
        assert list(said["svd_error"].values()) == pytest.approx(list(errors.values()), abs=1e-3)


def test_the_tables_have_a_line_for_every_adapter(collection: Path) -> None:
    assert [record["name"] for record in records(collection)] == IDS
    assert list(read_tasks(collection / "tasks.jsonl", NUM_TEST_ROWS)) == IDS


def test_side_by_side_each_is_trained_as_peft_alone_would_train_it(tiny_base: Path, tmp_path: Path) -> None:
    """Unlike ranks, scales, modules, numbers and lengths of rows; PEFT's own modules, and torch's own clipping."""
    plans = [
        AdapterPlan("country-id", "all", 2, 12),
        AdapterPlan("digit-sum", "b", 1, 12),
        AdapterPlan("past", "b", 2, 12),
        AdapterPlan("language-sv", "all", 1, 12),
    ]
    shapes = {plan.shape for plan in plans}
    assert {shape.rank for shape in shapes} == {4, 8, 16}
    assert {len(shape.modules) for shape in shapes} == {2, 3}
    assert {shape.rslora for shape in shapes} == {False, True}
    train(plans, tiny_base, tmp_path)
    for plan in plans:
        stored = load_file(Folders(tmp_path).adapter(plan) / "adapter_model.safetensors")
        expected = trained_by_peft(plan, tiny_base)
        assert stored.keys() == expected.keys()
        for name, factor in expected.items():
            torch.testing.assert_close(stored[name].float(), factor, rtol=2**-7, atol=1e-5)


def trained_by_peft(plan: AdapterPlan, base: Path) -> dict[str, Tensor]:
    """One adapter, its rows padded on the right; float32."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task, shape = all_tasks()[plan.task], plan.shape
    rows = subset_rows(task.split()[1], plan.subset)
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(plan.seed)
    config = LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, target_modules=list(shape.modules), use_rslora=shape.rslora
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    orders = random.Random(plan.seed)
    order = list(range(len(rows)))
    orders.shuffle(order)
    for step in range(plan.steps):
        if (step + 1) * 8 > len(rows):
            raise AssertionError("an epoch is enough here")
        prompts = [tokenizer(task.prompt(rows[i][0])).input_ids for i in order[step * 8 : step * 8 + 8]]
        answers = [tokenizer(f" {rows[i][1]}\n").input_ids for i in order[step * 8 : step * 8 + 8]]
        length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids, labels = torch.zeros(8, length, dtype=torch.long), torch.full((8, length), -100)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(p) + len(a)] = torch.tensor(p + a)
            labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 + math.cos(math.pi * step / plan.steps)) / 2
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in get_peft_model_state_dict(model).items()}


def test_what_is_no_number_in_one_adapter_is_named_and_reaches_no_other(tiny_base: Path, tmp_path: Path) -> None:
    """A token that only one adapter's rows have is NaN; it stands between two that are sound."""
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    train([PLANS[0], PLANS[2]], tiny_base, alone)
    base = load_base(str(tiny_base), torch.float32)
    token = base.tokenizer(" §").input_ids[-1]
    base.model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, out: out.masked_fill((inputs[0] == token).unsqueeze(-1), float("nan"))
    )
    signs = Task("signs", "broken", "{x} §", "", lambda: ((str(i), "z") for i in range(200)))
    plans = [PLANS[0], AdapterPlan("signs", "all", 0, 30), PLANS[2]]
    _, failed = train_adapters(plans, all_tasks() | {"signs": signs}, base, Folders(beside))
    assert failed == ["adapter signs.all.0.30: gradient nan at step 0; lower the rate"]
    assert sorted(path.name for path in (beside / "adapters").iterdir()) == [PLANS[0].adapter_id, PLANS[2].adapter_id]
    for plan in (PLANS[0], PLANS[2]):
        weights = Folders(alone).adapter(plan) / "adapter_model.safetensors"
        expected = load_file(weights)
        for name, factor in load_file(Folders(beside).adapter(plan) / weights.name).items():
            torch.testing.assert_close(factor, expected[name], rtol=2**-7, atol=1e-5)


def test_in_bfloat16_an_adapter_is_about_as_good(tiny_base: Path, tmp_path: Path) -> None:
    exact, _ = train(PLANS, tiny_base, tmp_path / "float32")
    rounded, _ = train(PLANS, tiny_base, tmp_path / "bfloat16", torch.bfloat16)
    for a, b in zip(exact, rounded, strict=True):
        assert b["lora_loss"] == pytest.approx(a["lora_loss"], rel=0.1)


def test_groups_hold_every_plan_once_and_one_number_of_steps(tasks: dict[str, Task]) -> None:
    plans = plan_adapters(tasks, 300)
    groups = side_by_side(plans, 4)
    assert Counter(plan for group in groups for plan in group) == Counter(plans)
    assert all(len(group) <= 4 and len({plan.steps for plan in group}) == 1 for group in groups)
    assert len(groups) <= 300 // 4 + len(STEPS)
    assert plans[0] in groups[0]


def test_plans_are_trained_to_the_same_bytes_again(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        train(PLANS, tiny_base, tmp_path / name)
    assert files(tmp_path / "first" / "adapters") == files(tmp_path / "again" / "adapters")


def test_over_ray_only_what_is_missing_is_trained_and_to_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    here, out = Folders(tmp_path / "here"), Folders(tmp_path / "out")
    train(PLANS[:1], tiny_base, here.root)
    train(PLANS[1:], tiny_base, here.root)  # --together 2
    shutil.copytree(here.adapter(PLANS[0]), out.adapter(PLANS[0]))
    (out.adapter(PLANS[0]) / "kept").touch()
    # As a command: a task that is pickled from __main__ is another thing than one of a module.
    subprocess.run([sys.executable, "-m", "infra.train_zoo", *arguments(tiny_base, out.root)], check=True)
    assert (out.adapter(PLANS[0]) / "kept").exists()
    for plan in PLANS[1:]:
        assert files(out.adapter(plan)) == files(here.adapter(plan))
    # The first was copied without its record, so the tables do not know it.
    assert [record["name"] for record in records(out.root)] == IDS[1:]


def test_another_base_is_not_mixed_in(collection: Path, base_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(base_path, collection)) == 2
    assert "trained on tests/tiny, not on HuggingFaceTB/SmolLM2-135M-Instruct" in capsys.readouterr().err


def test_planning_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "zoo"), "--adapters", "300", "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 301
    assert lines[-1].startswith("300 adapters of 119 tasks, ")
    line = ["--out", str(tmp_path / "zoo"), "--adapters", "12", "--long-answers", "--steps", "320", "--plan"]
    assert main([*line, "--learning-rate", "3e-4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "12 adapters of 12 tasks, 3840 steps: 12 of 320"
    assert all(line.split()[0].endswith(".320.0.0003") for line in lines[:-1])
    assert not (tmp_path / "zoo").exists()


def test_a_loss_that_is_no_number_is_refused_and_leaves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "base"
    shutil.copytree(tiny_base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "zoo"
    records, (failed,) = train([AdapterPlan("past", "all", 0, 2)], broken, out)
    assert records == []
    assert failed.startswith("adapter past.all.0.2: gradient nan at step 0")
    assert not out.exists()


def test_a_few_steps_on_the_real_base_lower_the_held_out_loss(base_path: Path, tmp_path: Path) -> None:
    (record,), _ = train([AdapterPlan("past", "all", 0, 8)], base_path, tmp_path, torch.bfloat16)
    store = open_store(str(tmp_path / "adapters"))
    (adapter,) = list_adapters(store).adapters
    read_adapter(store, adapter, read_base(str(base_path)))
    assert record["lora_loss"] < 0.7 * record["base_loss"]
