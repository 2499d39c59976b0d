"""The vLLM engine on the real base and real adapters: vLLM in its own processes, against PEFT.

On vLLM's CPU build, or on a GPU where there is one (make gpu-check), there with captured graphs.

Each trap that vLLM's LoRA code holds for compressed adapters has a test here, or in test_plugin.py.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import (
    BundleError,
    ConfigError,
    EngineStopped,
    HomeUnavailable,
    RequestError,
    UnknownAdapter,
)
from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin import compatibility
from tests.support.engines import (
    BROKEN,
    CLUSTERS,
    CUT,
    FACTORS,
    GONE,
    MAX_BATCH,
    MAX_MODEL_LEN,
    PROMPTS,
    RAW,
    RAW_HOME,
    WISHED_TOKENS,
    WISHES,
    Homes,
    ask,
    serving_map,
)
from tests.support.paths import REPOSITORY
from tests.support.processes import kill_session, processes_named
from tests.support.revisions import (
    assert_a_broken_revision_changes_nothing,
    assert_release_lets_running_requests_finish,
    assert_taking_up_again_mends,
    assert_two_revisions_answer_each_as_its_own,
    swapped,
)
from tests.support.vllm_engine import DEVICE, Running, make_engine

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(compatibility.vllm_version() is None, reason="vLLM is not here")]

# Than the default; the Triton kernels run on a GPU only.
OTHER_PRODUCTS = ("static", "triton", "grouped") if DEVICE == "cuda" else ("static", "grouped")


@pytest.fixture(scope="module")
def homes(zoo_path: Path) -> Homes:
    return Homes(zoo_path)


@pytest.fixture(scope="module")
def running(base_path: Path, homes: Homes) -> Iterator[Running]:
    running = Running(make_engine(base_path, homes, headroom=0.25))
    yield running
    running.close()


@pytest.fixture(scope="module", params=OTHER_PRODUCTS)
def others(request: pytest.FixtureRequest, base_path: Path, homes: Homes) -> Iterator[Running]:
    """The products that are not the default on a CPU in float32: a GPU's, on a CPU by vLLM's own CPU kernels, with all
    positions but the zero ones taken; and those of other dtypes."""
    running = Running(make_engine(base_path, homes, (*CLUSTERS, *FACTORS), products=request.param))
    yield running
    running.close()


def assert_exact(running: Running, oracle: dict[str | None, list[int]]) -> None:
    requests = [ask(name) for name in PROMPTS]
    assert running.tokens(*requests) == [oracle[name] for name in PROMPTS]


def test_homes_and_adapters_that_fail_are_recorded_and_leave_the_others_ready(running: Running) -> None:
    assert running.engine.health().alive
    health = running.engine.health().revisions[0]
    assert {home for home, state in health.homes.items() if state == "ready"} == {*CLUSTERS, *FACTORS}
    assert health.adapters.keys() == {"gone", "nan"}
    assert health.adapters["gone"] == GONE
    assert health.adapters["nan"].startswith("BundleError: adapter 'nan': B of module 'model.layers.")
    assert "is not finite" in health.adapters["nan"]
    assert "StoreUnreachable: http://127.0.0.1:1: connection refused" in health.homes[BROKEN["unreachable"]]
    assert "model.layers.99.self_attn.q_proj" in health.homes[BROKEN["alien"]]
    assert "expected (2, 192, 8)" in health.homes[BROKEN["misfit"]]
    assert "the serving map has 2" in health.homes[BROKEN["short"]]


def test_a_mixed_batch_answers_as_peft_does_and_again_out_of_the_prefix_cache(
    running: Running, oracle: dict[str | None, list[int]]
) -> None:
    """Two clusters, a raw adapter, truncated ones of two ranks and base rows in one batch."""
    for _ in range(2):
        assert_exact(running, oracle)
    for name in PROMPTS:
        assert running.tokens(ask(name)) == [oracle[name]]


def test_bias_and_penalties_change_the_answers_of_a_batch_as_their_definitions_say(
    running: Running, wished: dict[str | None, list[int]]
) -> None:
    answers = running.tokens(*(ask(name, max_tokens=WISHED_TOKENS, **options) for name, options in WISHES.items()))
    assert dict(zip(WISHES, answers, strict=True)) == wished


def test_base_rows_are_untouched_in_a_batch_whose_last_position_is_taken(
    others: Running, oracle: dict[str | None, list[int]]
) -> None:
    """The trap: vLLM's CPU kernels take index -1, a token without an adapter, for the last slot."""
    names = [None, RAW, None, *CUT]
    assert others.tokens(*(ask(name) for name in names)) == [oracle[name] for name in names]


def test_fallback_only_compressed_only_and_mixed_batches_are_exact_with_the_other_products(
    others: Running, oracle: dict[str | None, list[int]]
) -> None:
    """The trap: a branch on what the batch holds is frozen by a capture, and raw adapters answer as the base."""
    for names in ([RAW, *CUT], ["number-en", "roman"], list(PROMPTS)):
        assert others.tokens(*(ask(name) for name in names)) == [oracle[name] for name in names]


@pytest.mark.parametrize("products", ["static", None])
def test_an_engine_starts_with_more_raw_adapters_than_a_batch_holds(
    products: str | None, base_path: Path, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    """The trap: vLLM wants its cache of LoRAs, which is as large as a batch by default, to hold every LoRA slot, and
    tells its kernels of no more adapters than that."""
    running = Running(make_engine(base_path, homes, (RAW_HOME,), products=products, max_batch=1))
    try:
        assert running.tokens(ask(RAW)) == [oracle[RAW]]
    finally:
        running.close()


def test_one_prompt_asked_of_every_adapter_shares_no_cached_prefix(running: Running) -> None:
    """The prefix cache's key holds the served revision: alone, uncached, each says the same as after the others."""
    prompt = "Q: 450 in English words? " * 20  # several blocks of the cache
    names = [name for name in PROMPTS if name != "last-letter"]
    first = {name: running.tokens(ask(name, prompt=prompt, max_tokens=12))[0] for name in names}
    again = running.tokens(*(ask(name, prompt=prompt, max_tokens=12) for name in reversed(names)))
    assert dict(zip(reversed(names), again, strict=True)) == first
    assert len({tuple(tokens) for tokens in first.values()}) >= 4, "the adapters hardly differ here"
    running.run(running.engine._llm.reset_prefix_cache())
    assert running.tokens(*(ask(name, prompt=prompt, max_tokens=12) for name in names)) == list(first.values())


def test_the_lora_name_holds_the_served_revision(running: Running) -> None:
    """The trap: before vLLM 0.32 the prefix cache's key holds the name alone."""
    served = serving_map().find("roman")
    assert running.engine.lora_request(served).lora_name == f"roman@{served.served}"


def test_two_revisions_of_one_adapter_in_one_batch_each_answer_as_their_own(
    running: Running, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    """The trap: vLLM knows LoRAs by a number, and two places under one number are one of them."""
    before = running.run(running.engine.resident_bytes())
    assert_two_revisions_answer_each_as_its_own(running.runner, running.engine, homes, oracle)
    assert running.run(running.engine.resident_bytes()) == before
    assert_exact(running, oracle)


def test_a_revision_that_fails_is_refused_whole_and_leaves_the_one_before(
    running: Running, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    assert_a_broken_revision_changes_nothing(running.runner, running.engine, homes, oracle)


def test_a_revision_is_forgotten_once_nobody_runs_on_it(
    running: Running, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    """The trap: an adapter that is removed under a running request is loaded again from nowhere, and vLLM dies."""
    assert_release_lets_running_requests_finish(running.runner, running.engine, homes, oracle)


def test_a_home_is_there_once_its_store_is_back(
    running: Running, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    assert_taking_up_again_mends(running.runner, running.engine, homes, oracle)


def test_a_revision_that_there_is_no_room_for_is_refused_before_vllm_and_nothing_dies(
    others: Running, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    """The trap: more distinct adapters than slots raise in vLLM's worker and end its process."""
    with pytest.raises(BundleError, match=r"home 'cluster:1': 2 cores more, .* raise placement\.headroom"):
        others.run(others.engine.take_up(swapped(homes)))
    assert set(others.engine.health().revisions) == {0}
    assert_exact(others, oracle)


def test_more_distinct_adapters_than_a_batch_holds_wait_and_all_answer(
    running: Running, oracle: dict[str | None, list[int]]
) -> None:
    names = [name for name in PROMPTS for _ in range(3)]
    assert len(names) > MAX_BATCH
    assert running.tokens(*(ask(name) for name in names)) == [oracle[name] for name in names]


def test_what_cannot_be_answered_is_refused_before_vllm_sees_it(running: Running) -> None:
    for request, error in [
        (ask("no-such-adapter", prompt="x"), UnknownAdapter),
        (ask("elsewhere", prompt="x"), HomeUnavailable),
        (ask("nan", prompt="x"), HomeUnavailable),
        (ask("gone", prompt="x"), HomeUnavailable),
        (ask(None, prompt="x", max_tokens=MAX_MODEL_LEN), RequestError),
        (ask(None, prompt_token_ids=(10**6,)), RequestError),
        (ask(None, prompt="x", top_p=0.0), RequestError),
        (ask(None, prompt="x", logit_bias=((10**6, 1.0),)), RequestError),
        (ask(None, prompt="x", stop_token_ids=(10**6,)), RequestError),
    ]:
        with pytest.raises(error):
            running.tokens(request)
    assert running.engine.health().alive


def test_a_seed_draws_the_same_tokens_again(running: Running) -> None:
    requests = [ask("roman", temperature=1.5, seed=seed, ignore_eos=True) for seed in (7, 7, 8, -1, 2**64 - 1)]
    first = running.tokens(*requests)
    assert first[0] == first[1] != first[2]


def test_engines_that_are_not_ours_get_vllms_own_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    from serve_app.engine.vllm.plugin import worker_manager
    from serve_app.engine.vllm.plugin.register import register

    for cls in ("HomeWorkerManager", "StockWorkerManager"):
        monkeypatch.setattr(worker_manager, cls, lambda *_, name=cls: name)
    register()
    register()  # vLLM may call it more than once
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    make = mixin.LRUCacheWorkerLoRAManager
    ours = running_config = SimpleNamespace(additional_config=settings_section())
    assert make(ours) == "HomeWorkerManager"
    running_config.additional_config = {"somebody": "else"}
    assert make(running_config) == "StockWorkerManager"


def settings_section() -> dict[str, Any]:
    from serve_app.engine.vllm.plugin.settings import PluginSettings

    return PluginSettings(1, 1, 1, ((4, 1),), False, "grouped").to_config()


@pytest.mark.parametrize(
    ("where", "name", "value", "said"),
    [
        ("lora_config", "fully_sharded_loras", True, "fully_sharded_loras"),
        ("lora_config", "target_modules", None, "lora_target_modules unset"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline_parallel_size"),
        ("environment", "VLLM_LORA_ENABLE_DUAL_STREAM", "1", "DUAL_STREAM"),
    ],
)
def test_settings_that_were_never_tried_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, where: str, name: str, value: Any, said: str
) -> None:
    config = SimpleNamespace(
        lora_config=SimpleNamespace(fully_sharded_loras=False, target_modules=["q_proj"]),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        speculative_config=None,
    )
    model = torch.nn.Linear(2, 2)
    compatibility.check_settings(config, model)
    if where == "environment":
        monkeypatch.setenv(name, value)
    else:
        setattr(getattr(config, where), name, value)
    with pytest.raises(ConfigError, match=said):
        compatibility.check_settings(config, model)


def test_warm_up_holds_compressed_and_raw_adapters() -> None:
    """The trap: dummies of one kind only, and a capture knows no other."""
    from serve_app.engine.vllm.plugin.settings import PluginSettings
    from serve_app.engine.vllm.plugin.worker_manager import HomeWorkerManager

    worker = object.__new__(HomeWorkerManager)
    worker.lora_config = SimpleNamespace(max_loras=8)
    worker._adapter_manager = SimpleNamespace(settings=PluginSettings(20, 4, 8, ((8, 1), (16, 900)), False, "static"))
    dummies = worker._dummies
    assert sorted(dummies) == list(range(1, 9))
    assert {place.bucket for place in dummies.values()} == {0, 1, None}


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("kind", ["cluster", "stack"])
def test_tensor_parallel_ranks_add_up_to_the_whole_delta(kind: str, num_ranks: int) -> None:
    """By vLLM's own slicing rules, on layers that hold just what these rules read."""
    from vllm.lora.layers import MergedQKVParallelLinearWithLoRA, RowParallelLinearWithLoRA

    from serve_app.engine.vllm.plugin.lora_layers import shard

    torch.manual_seed(0)
    d_in, d_outs, r = 12, (24, 12, 12), 4
    whole = [ModuleWeights(torch.randn(d, r), torch.randn(d_in, r), torch.randn(2, r, r)) for d in d_outs]
    if kind == "stack":
        index = torch.tensor([2, 0, 1])
        whole = [ModuleWeights(torch.randn(3, d, r), torch.randn(3, d_in, r), None, index) for d in d_outs]
    x = torch.randn(5, d_in)

    def delta(weights: ModuleWeights, x: torch.Tensor) -> torch.Tensor:
        if weights.rows is not None:
            return x @ weights.V[weights.rows[1]] @ weights.U[weights.rows[1]].T
        assert weights.cores is not None
        return x @ weights.V @ weights.cores[1].T @ weights.U.T

    def layer(kind: Any, rank: int, **attributes: Any) -> Any:
        own = SimpleNamespace(tp_size=num_ranks, tp_rank=rank, **attributes)
        own.slice_lora_a = lambda A: kind.slice_lora_a(own, A)
        own.slice_lora_b = lambda B: kind.slice_lora_b(own, B)
        return own

    columns, rows = [[] for _ in d_outs], torch.zeros(5, d_outs[0])
    for rank in range(num_ranks):
        sizes = tuple(d // num_ranks for d in d_outs)
        packed = layer(MergedQKVParallelLinearWithLoRA, rank, n_slices=3, output_slices=sizes, output_ids=(rank,) * 3)
        for i, weights in enumerate(whole):
            part = shard(packed, i, weights)
            assert part is not None
            columns[i].append(delta(part, x))
        width = d_in // num_ranks
        row = shard(layer(RowParallelLinearWithLoRA, rank, n_slices=1, input_size=width), 0, whole[0])
        assert row is not None
        rows += delta(row, x[:, rank * width : (rank + 1) * width])
    for parts, weights in zip(columns, whole, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), delta(weights, x))
    torch.testing.assert_close(rows, delta(whole[0], x), rtol=1e-4, atol=1e-4)


def test_a_killed_vllm_is_an_engine_that_stopped_not_a_hang(base_path: Path, homes: Homes) -> None:
    running = Running(make_engine(base_path, homes, ("cluster:0",)))

    async def kill_under_load() -> None:
        stream = running.engine.generate(ask("number-en", max_tokens=400, ignore_eos=True))
        await anext(stream)
        for process in children(os.getpid()):
            os.kill(process, signal.SIGKILL)
        with pytest.raises(EngineStopped):
            async for _ in stream:
                pass

    running.run(asyncio.wait_for(kill_under_load(), 60))
    assert not running.engine.health().alive
    with pytest.raises(EngineStopped):
        running.tokens(ask("number-en"))
    running.close()


HELD = """
import sys, time
from pathlib import Path
from tests.serve_app.engine.vllm.test_engine import Running, make_engine
from tests.support.engines import Homes
if __name__ == "__main__":
    running = Running(make_engine(Path(sys.argv[1]), Homes(Path(sys.argv[2])), ("cluster:0",)))
    print("ready", flush=True)
    time.sleep(600)
"""


def test_vllm_ends_with_a_replica_that_is_killed_hard(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    """vLLM's own engine process would go on as an orphan, with the device's memory in its hands."""
    script = tmp_path / "held.py"
    script.write_text(HELD)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, str(script), str(base_path), str(zoo_path)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert any(text == "ready\n" for text in process.stdout)
            assert processes_named("VLLM::", process.pid), "vLLM runs"
            process.kill()
            deadline = time.monotonic() + 30
            while processes_named("VLLM::", process.pid):
                assert time.monotonic() < deadline, "vLLM outlived its replica"
                time.sleep(0.2)
        finally:
            kill_session(process)


def children(parent: int) -> list[int]:
    """vLLM's engine processes started by ``parent``, whose names they set themselves."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == parent and "EngineCore" in command:
                found.append(int(folder.name))
    return found
