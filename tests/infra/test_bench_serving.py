"""The serving benchmark's own arithmetic: what it draws, what it counts, and how sure it says it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cluster.bundle.reading import Bundle
from infra.bench.serving.figures import paired_ratio, summarize
from infra.bench.serving.fleet import clusters_for, equal_bytes_rank, equal_bytes_slots, make_fleet, truncate_fleet
from infra.bench.serving.load import LOADS, Load, Question, Run, draw_questions, drive
from infra.bench.serving.registered import enlarge
from tests.support.bundles import write_bundle


def test_the_interval_of_a_median_holds_it_95_times_in_a_hundred() -> None:
    random = np.random.default_rng(0)
    for n in (6, 9, 20):
        held = 0
        for _ in range(2000):
            ratio = paired_ratio(random.lognormal(0, 1, n), np.ones(n))  # type: ignore[arg-type]  # its median is 1
            held += ratio.low <= 1 <= ratio.high
        assert held / 2000 >= 0.94, n
    assert paired_ratio([2, 6, 12], [1, 2, 3]) == paired_ratio([4, 3, 2], [1, 1, 1])


def test_no_two_prompts_share_a_prefix_and_each_round_draws_anew() -> None:
    first, second = (draw_questions(LOADS["paper"], "uniform", 64, 500, 49152, (0, 64, r)) for r in (1, 2))
    assert len({question.prompt_ids[:3] for question in first}) == 500
    assert not {question.prompt_ids for question in first} & {question.prompt_ids for question in second}
    assert draw_questions(LOADS["paper"], "uniform", 64, 500, 49152, (0, 64, 1)) == first


def test_popularity_is_uniform_or_zipf() -> None:
    def share_of_the_first(popularity: str) -> float:
        drawn = draw_questions(LOADS["paper"], popularity, 100, 4000, 49152, (0,))
        return sum(question.adapter == 0 for question in drawn) / 4000

    assert share_of_the_first("uniform") == pytest.approx(0.01, abs=0.006)
    assert share_of_the_first("zipf") == pytest.approx(1 / sum(i**-1.5 for i in range(1, 101)), abs=0.03)


class SlowRow:
    name, start_s, resident_bytes = "slow", 0.0, 0

    def __init__(self, tokens: int) -> None:
        self.tokens, self.at_once, self.most = tokens, 0, 0

    async def ask(self, question: Question, answer_tokens: int) -> AsyncIterator[int]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        for _ in range(self.tokens):
            await asyncio.sleep(0.01)
            yield 1
        self.at_once -= 1

    async def close(self) -> None: ...


def test_clients_ask_at_once_and_every_answer_is_counted() -> None:
    row = SlowRow(4)
    questions = [Question(0, (1,))] * 12
    run = asyncio.run(drive(row, questions, 4, clients=3))
    assert row.most == 3
    assert (len(run.first_token_s), run.tokens) == (12, 48)
    assert run.seconds >= 4 * 4 * 0.01
    assert min(run.first_token_s) >= 0.01
    assert run.requests_per_s == pytest.approx(12 / run.seconds)
    assert summarize([run])["each_token_ms_mean"] >= 10


def test_an_answer_that_is_too_short_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="3 tokens, expected 4"):
        asyncio.run(drive(SlowRow(3), [Question(0, (1,))], 4, clients=1))


def test_summaries_are_of_all_answers_of_all_rounds() -> None:
    runs = [Run(2.0, 20, [0.1, 0.3], [0.01, 0.01]), Run(1.0, 20, [0.2, 0.2], [0.03, 0.03])]
    figures = summarize(runs)
    assert figures["requests_per_s"] == 1.5
    assert figures["first_token_ms_mean"] == pytest.approx(200)
    assert figures["each_token_ms_mean"] == pytest.approx(20)


def test_variations_are_other_adapters_of_the_same_shape_and_the_same_each_time(zoo_path: Path, tmp_path: Path) -> None:
    fleet = make_fleet(zoo_path, 14, tmp_path / "a")
    again = make_fleet(zoo_path, 14, tmp_path / "b")
    assert (fleet.num_real, len(set(fleet.folders)), fleet.rank) == (12, 14, 16)
    assert fleet.modules == ("k_proj", "q_proj", "v_proj")
    original, variation = (load_file(fleet.folders[i] / "adapter_model.safetensors") for i in (0, 12))
    repeated = load_file(again.folders[12] / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in original.items()} == {
        name: tensor.shape for name, tensor in variation.items()
    }
    changed = [name for name in original if not torch.equal(original[name], variation[name])]
    assert len(changed) == len(original) / 2
    assert all(torch.equal(variation[name], repeated[name]) for name in variation)


def test_equal_bytes_are_counted_in_numbers(zoo_path: Path, tmp_path: Path) -> None:
    fleet = make_fleet(zoo_path, 12, tmp_path)
    one_rank = 30 * (3 * 576 + 576 + 192 + 192)
    assert fleet.rank_numbers == one_rank
    assert equal_bytes_rank(fleet, 12 * 5 * one_rank * 2, 2) == 5
    assert equal_bytes_rank(fleet, 1, 2) == 1
    assert equal_bytes_slots(fleet, round(3 * fleet.adapter_numbers * 2), 2) == 3
    assert equal_bytes_slots(fleet, 10**12, 2) == 12
    [cut, *_] = truncate_fleet(fleet, 2, tmp_path / "cut")
    assert {min(tensor.shape) for tensor in load_file(cut / "adapter_model.safetensors").values()} == {2}
    assert [clusters_for(n) for n in (1, 16, 64, 256, 1024)] == [1, 2, 8, 25, 25]


def test_ten_times_the_adapters_are_registered_on_the_same_bases(
    zoo_path: Path, base_path: Path, tmp_path: Path
) -> None:
    clusters = {"0": {"add": zoo_path / "add", "past": zoo_path / "past"}, "1": {"roman": zoo_path / "roman"}}
    write_bundle(tmp_path / "few", base_path, clusters, {})
    few = Bundle.open(str(tmp_path / "few"))
    many = enlarge(few, 30, tmp_path / "many")
    assert len(many.manifest.adapters) == 30
    assert len({(adapter.cluster, adapter.slot) for adapter in many.manifest.adapters.values()}) == 30
    own, enlarged = few.load_home("cluster:0").weights, many.load_home("cluster:0").weights
    for module, weights in own.items():
        assert torch.equal(enlarged[module].U, weights.U)
        assert enlarged[module].cores is not None
        assert weights.cores is not None
        assert torch.equal(enlarged[module].cores[:2], weights.cores)  # type: ignore[index]
        assert len({tuple(core.flatten().tolist()) for core in enlarged[module].cores}) == 20  # type: ignore[union-attr]


def test_loads_are_the_papers_and_a_chats() -> None:
    assert {"paper": Load(24, 10), "chat": Load(128, 64)} == LOADS
