"""The transformers engine on the real base and real adapters, against PEFT's own generate.

The homes are those of tests/support/engines.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import shutil
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServingMap
from cluster.errors import (
    BaseModelError,
    BundleError,
    ConfigError,
    EngineStopped,
    HomeUnavailable,
    RequestError,
    ServeError,
    UnknownAdapter,
)
from serve_app.engine.protocol import GenerationChunk, GenerationRequest
from serve_app.engine.revisions import Revision
from serve_app.engine.transformers.engine import TransformersEngine
from serve_app.engine.transformers.settings import EngineSettings
from tests.support.engines import (
    BROKEN,
    CLUSTERS,
    DEVICE,
    FACTORS,
    GONE,
    MAX_BATCH,
    MAX_MODEL_LEN,
    PROMPTS,
    WISHED_TOKENS,
    WISHES,
    Answer,
    Homes,
    ask,
    collect,
    served,
    serving_map,
)
from tests.support.revisions import (
    assert_a_broken_revision_changes_nothing,
    assert_release_lets_running_requests_finish,
    assert_taking_up_again_mends,
    assert_two_revisions_answer_each_as_its_own,
    swapped,
)

NOTHING = Revision(0, ServingMap("b", {}), (), lambda home: LoadedHome({}))


@pytest.fixture(scope="module")
def homes(zoo_path: Path) -> Homes:
    return Homes(zoo_path)


@pytest.fixture(scope="module")
def engine(base_path: Path, homes: Homes) -> Iterator[TransformersEngine]:
    wanted = [*CLUSTERS, *FACTORS, *BROKEN.values()]
    engine = TransformersEngine(
        base_path,
        Revision(0, serving_map(), tuple(wanted), homes.load),
        EngineSettings(DEVICE, max_batch=MAX_BATCH, max_model_len=MAX_MODEL_LEN, num_threads=2),
    )
    asyncio.run(engine.start())
    yield engine
    asyncio.run(engine.stop())


def answer(engine: TransformersEngine, *requests: GenerationRequest) -> list[Answer]:
    async def gather() -> list[Answer]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    return asyncio.run(gather())


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited a minute for nothing")


@asynccontextmanager
async def full_batch(engine: TransformersEngine) -> AsyncIterator[list[AsyncGenerator[GenerationChunk, None]]]:
    """A stream for every row of the batch, each with its first chunk taken; closed at the end."""
    async with AsyncExitStack() as stack:
        streams = []
        for _ in range(MAX_BATCH):
            stream = engine.generate(ask("past", max_tokens=400, ignore_eos=True))
            streams.append(await stack.enter_async_context(aclosing(stream)))
            await anext(stream)
        yield streams


# Exactness.


def test_homes_and_adapters_that_fail_are_recorded_and_leave_the_others_ready(engine: TransformersEngine) -> None:
    assert engine.health().alive
    health = engine.health().revisions[0]
    assert {home for home, state in health.homes.items() if state == "ready"} == {*CLUSTERS, *FACTORS}
    assert health.adapters == {"gone": GONE}
    with pytest.raises(HomeUnavailable, match=f"adapter 'gone' is not being served: {GONE}"):
        answer(engine, ask("gone", prompt="x"))
    assert "StoreUnreachable: http://127.0.0.1:1: connection refused" in health.homes[BROKEN["unreachable"]]
    assert "model.layers.99.self_attn.q_proj" in health.homes[BROKEN["alien"]]
    assert "expected (2, 192, 8)" in health.homes[BROKEN["misfit"]]
    assert "1 slots at module" in health.homes[BROKEN["short"]]
    assert "the serving map has 2" in health.homes[BROKEN["short"]]


@pytest.mark.by_hand
@pytest.mark.slow
def test_every_adapter_alone_answers_as_peft_does(
    engine: TransformersEngine, oracle: dict[str | None, list[int]]
) -> None:
    assert len({tuple(tokens) for tokens in oracle.values()}) == len(oracle), "the oracle must tell adapters apart"
    for adapter, expected in oracle.items():
        assert answer(engine, ask(adapter))[0].token_ids == expected, adapter


@pytest.mark.slow
def test_bias_and_penalties_change_the_answers_of_a_batch_as_their_definitions_say(
    engine: TransformersEngine, oracle: dict[str | None, list[int]], wished: dict[str | None, list[int]]
) -> None:
    answers = answer(engine, *(ask(name, max_tokens=WISHED_TOKENS, **options) for name, options in WISHES.items()))
    assert {name: found.token_ids for name, found in zip(WISHES, answers, strict=True)} == wished
    assert not [name for name in WISHES if wished[name] == oracle[name][:WISHED_TOKENS]]


def test_log_probabilities_are_pefts_whatever_is_done_to_the_logits(
    engine: TransformersEngine, peft, oracle: dict[str | None, list[int]], tokenizer
) -> None:
    """Of a greedy answer, and of one that a bias leads elsewhere."""
    prompt = tokenizer(PROMPTS["past"])["input_ids"]
    greedy = ask("past", logprobs=3, max_tokens=6, ignore_eos=True)
    biased = replace(greedy, logit_bias=((oracle["past"][0], -100.0),))
    found = answer(engine, greedy, biased)
    assert found[0].token_ids == oracle["past"][:6]
    assert found[1].token_ids[0] != oracle["past"][0]
    peft.set_adapter("past")
    for own in found:
        with torch.inference_mode():
            ids = torch.tensor([prompt + own.token_ids], device=DEVICE)
            expected = peft(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).cpu()
        assert len(own.logprobs) == 6
        for token, told, row in zip(own.token_ids, own.logprobs, expected, strict=True):
            values, tokens = row.topk(3)
            assert told.text == tokenizer.decode([token])
            assert told.logprob == pytest.approx(float(row[token]), abs=2e-3)
            assert [text for text, _ in told.top] == [tokenizer.decode([t]) for t in tokens.tolist()]
            assert [value for _, value in told.top] == pytest.approx(values.tolist(), abs=2e-3)


def test_an_echo_is_the_prompts_text_before_the_answer(engine: TransformersEngine, tokenizer) -> None:
    prompt = PROMPTS["past"]
    plain, echoed, by_tokens = answer(
        engine,
        ask("past"),
        ask("past", echo=True, stop=("Past",)),
        ask("past", echo=True, prompt_token_ids=tuple(tokenizer(prompt)["input_ids"])),
    )
    assert echoed.text == by_tokens.text == prompt + plain.text
    assert echoed.last.num_completion_tokens == plain.last.num_completion_tokens


def test_a_stop_token_ends_an_answer_counts_as_a_token_and_has_no_text(
    engine: TransformersEngine, oracle: dict[str | None, list[int]], tokenizer
) -> None:
    first, second, third = oracle["number-en"][:3]
    stopped, later = answer(
        engine,
        ask("number-en", stop_token_ids=(third,), ignore_eos=True),
        ask("number-en", stop_token_ids=(third,), min_tokens=3),
    )
    assert (stopped.token_ids, stopped.last.finish_reason) == ([first, second, third], "stop")
    assert stopped.text == tokenizer.decode([first, second])
    assert later.token_ids[:2] == [first, second]
    assert later.token_ids[2] != third
    assert len(later.token_ids) > 3


def test_a_stop_that_is_a_special_token_ends_the_answer_though_no_text_has_it(
    engine: TransformersEngine, tokenizer
) -> None:
    messages = ({"role": "user", "content": "Say hello."},)
    endless = ask(None, messages=messages, max_tokens=60, ignore_eos=True)
    ended, stopped = answer(engine, replace(endless, ignore_eos=False), replace(endless, stop=(tokenizer.eos_token,)))
    assert stopped.token_ids == ended.token_ids
    assert (stopped.text, stopped.last.finish_reason) == (ended.text, "stop")
    with pytest.raises(RequestError, match="holds the special token") as caught:
        answer(engine, ask(None, prompt="x", stop=(f"a{tokenizer.eos_token}",)))
    assert caught.value.param == "stop"


@pytest.mark.slow
def test_a_mixed_batch_joined_at_different_times_answers_as_peft_does(
    engine: TransformersEngine, oracle: dict[str | None, list[int]]
) -> None:
    async def staggered() -> dict[str | None, list[int]]:
        tokens: dict[str | None, list[int]] = {}
        running: list[asyncio.Task[None]] = []

        async def run(adapter: str | None, joined: asyncio.Event) -> None:
            tokens[adapter] = []
            async for chunk in engine.generate(ask(adapter)):
                tokens[adapter] += chunk.token_ids
                if len(tokens[adapter]) == 2:
                    joined.set()

        for adapter in oracle:
            joined = asyncio.Event()
            running.append(asyncio.create_task(run(adapter, joined)))
            await joined.wait()
        assert engine.health().num_running == len(oracle), "all must run in one batch at some time"
        await asyncio.gather(*running)
        return tokens

    assert asyncio.run(staggered()) == oracle


@pytest.mark.slow
def test_one_prompt_through_every_adapter_at_once_answers_as_each_alone(engine: TransformersEngine) -> None:
    """Prefilled together, so that only the adapter can tell the rows apart; more of them than there are rows."""
    adapters = [*PROMPTS, *PROMPTS]
    requests = [ask(adapter, prompt="Q: 7?\nA:", max_tokens=4, ignore_eos=True) for adapter in adapters]
    together = answer(engine, *requests)
    alone = [answer(engine, request)[0] for request in requests[: len(PROMPTS)]]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone] * 2
    assert len({tuple(a.token_ids) for a in alone}) > len(PROMPTS) // 2


@pytest.mark.slow
def test_prompts_of_very_different_lengths_prefill_together_as_alone(engine: TransformersEngine, tokenizer) -> None:
    """Beyond the first block of the KV cache, too."""
    long = tokenizer(" ".join(f"item {i}," for i in range(90)))["input_ids"]
    assert 256 < len(long) < MAX_MODEL_LEN - 8
    prompts = [tuple(long), tuple(long[:1]), tuple(long[:70]), tuple(long[:7])]
    requests = [ask("roman", prompt_token_ids=prompt, max_tokens=6, ignore_eos=True) for prompt in prompts]
    alone = [answer(engine, request)[0].token_ids for request in requests]
    assert [a.token_ids for a in answer(engine, *requests)] == alone


# Sampling.


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text_whatever_else_runs(engine: TransformersEngine) -> None:
    seeded = ask("number-en", temperature=0.9, top_p=0.95, seed=5, max_tokens=10)
    others = [
        ask("roman", temperature=0.7, seed=1, max_tokens=12),
        ask(None, temperature=1.3, top_p=0.5, seed=5, max_tokens=8),
        ask("past", max_tokens=6),
    ]
    alone, again = answer(engine, seeded)[0], answer(engine, seeded)[0]
    among = answer(engine, *others, seeded)[-1]
    assert alone.token_ids == again.token_ids == among.token_ids
    assert answer(engine, replace(seeded, seed=6))[0].token_ids != alone.token_ids


def test_without_a_seed_every_answer_is_drawn_anew(engine: TransformersEngine) -> None:
    request = ask(None, temperature=2.0, max_tokens=8, ignore_eos=True)
    assert len({tuple(a.token_ids) for a in answer(engine, *[request] * 4)}) == 4


# Where an answer ends.


def test_the_context_ends_an_answer_without_max_tokens(engine: TransformersEngine) -> None:
    prompt = (504,) * (MAX_MODEL_LEN - 5)
    result = answer(engine, ask(None, prompt_token_ids=prompt, max_tokens=None, ignore_eos=True))[0]
    assert (len(result.token_ids), result.last.finish_reason) == (5, "length")
    assert result.last.num_prompt_tokens == MAX_MODEL_LEN - 5


def test_eos_ends_an_answer_counts_as_a_token_and_has_no_text(engine: TransformersEngine, tokenizer) -> None:
    messages = ({"role": "user", "content": "Say hello."},)
    result = answer(engine, ask(None, messages=messages, max_tokens=60))[0]
    assert result.last.finish_reason == "stop"
    assert result.token_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in result.token_ids[:-1]
    assert result.text == tokenizer.decode(result.token_ids[:-1])

    num = len(result.token_ids)
    ignoring = ask(None, messages=messages, max_tokens=num + 3, ignore_eos=True)
    later = ask(None, messages=messages, max_tokens=num + 3, min_tokens=num)
    ignored, forced = answer(engine, ignoring, later)
    assert ignored.token_ids[:num] == result.token_ids
    assert (len(ignored.token_ids), ignored.last.finish_reason) == (num + 3, "length")
    assert forced.token_ids[: num - 1] == result.token_ids[:-1]
    assert forced.token_ids[num - 1] != tokenizer.eos_token_id
    assert len(forced.token_ids) > num


def test_a_stop_string_ends_an_answer_across_tokens_and_is_not_part_of_it(engine: TransformersEngine) -> None:
    whole = answer(engine, ask("number-en", max_tokens=7))[0]
    assert whole.text.startswith(" four hundred and fifty")
    stopped, late = answer(
        engine,
        ask("number-en", max_tokens=7, stop=("dred an", "never")),
        ask("number-en", max_tokens=7, stop=(" hundred",), min_tokens=3),
    )
    assert (stopped.text, stopped.last.finish_reason) == (" four hun", "stop")
    assert len(stopped.token_ids) < len(whole.token_ids)
    assert late.text == whole.text


def test_streamed_pieces_make_the_whole_text_and_characters_stay_whole(engine: TransformersEngine, tokenizer) -> None:
    prompt = "日本語のテキスト: 東京は日本の首都です。大阪は"
    result = answer(engine, ask(None, prompt=prompt, max_tokens=20, ignore_eos=True))[0]
    whole = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    assert result.text == whole
    assert len(whole.encode()) > len(whole), "the answer must have characters of several bytes"
    assert not any("\ufffd" in piece for piece in result.pieces[:-1])
    assert len(result.pieces) == 20


# Refusals.


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"prompt_token_ids": (5,) * MAX_MODEL_LEN}, "prompt", "512 tokens, the context holds 512"),
        ({"messages": ({"role": "user", "content": "word " * 600},)}, "messages", "the context holds 512"),
        ({"prompt_token_ids": (5,) * 500, "max_tokens": 13}, "max_tokens", "together 513"),
        ({"prompt": "hi", "max_tokens": 3, "min_tokens": 4}, "min_tokens", "at most 3"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "\ud800"}, "prompt", "cannot be tokenized"),
        ({"prompt_token_ids": (49152,)}, "prompt", "token id 49152 is outside the vocabulary of 49152"),
        ({"prompt_token_ids": (-1,)}, "prompt", "token id -1"),
        ({"messages": ()}, "messages", "empty"),
        ({"messages": ({"role": "user"},)}, "messages", "cannot be tokenized"),
        ({"prompt": "hi", "prompt_token_ids": (5,)}, "prompt", "exactly one"),
        ({"prompt": "hi", "temperature": -0.1}, "temperature", "-0.1"),
        ({"prompt": "hi", "temperature": math.inf}, "temperature", "inf"),
        ({"prompt": "hi", "top_p": 0.0}, "top_p", "0.0"),
        ({"prompt": "hi", "max_tokens": 0}, "max_tokens", "0"),
        ({"prompt": "hi", "stop": ("",)}, "stop", "at least one character"),
        ({"prompt": "hi", "logit_bias": ((49152, 1.0),)}, "logit_bias", "49152 is outside the vocabulary of 49152"),
        ({"prompt": "hi", "stop_token_ids": (49152,)}, "stop_token_ids", "49152 is outside the vocabulary of 49152"),
        ({"prompt": "hi", "repetition_penalty": 0.0}, "repetition_penalty", "more than 0"),
        ({"prompt": "hi", "min_p": 1.5}, "min_p", "0 to 1"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_by_field(
    engine: TransformersEngine, options: dict, param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        answer(engine, ask(None, **options))
    assert caught.value.param == param
    assert engine.health().num_running == 0


def test_an_adapter_that_is_not_served_is_refused_and_never_answered_by_the_base(engine: TransformersEngine) -> None:
    with pytest.raises(UnknownAdapter, match="'nobody'"):
        answer(engine, ask("nobody", prompt="hi"))
    with pytest.raises(HomeUnavailable, match="connection refused"):
        answer(engine, ask("unreachable", prompt="hi"))
    with pytest.raises(HomeUnavailable, match=r"cluster:9.*not given to this engine"):
        answer(engine, ask("elsewhere", prompt="hi"))


def test_an_adapter_whose_output_is_not_finite_fails_alone(
    engine: TransformersEngine, oracle: dict[str | None, list[int]]
) -> None:
    """Neither those prefilled with it, nor those that run beside it, nor who gets its row next are harmed."""
    broken = ask("nan", prompt=PROMPTS["roman"])

    async def run() -> None:
        stream = engine.generate(ask("roman", max_tokens=20))
        tokens = list((await anext(stream)).token_ids)
        first, base, second = await asyncio.gather(
            *(collect(engine, request) for request in (broken, ask(None, max_tokens=3), broken)), return_exceptions=True
        )
        for failed in (first, second):
            assert isinstance(failed, ServeError)
            assert "'nan'" in str(failed)
        assert isinstance(base, Answer)
        assert base.token_ids == oracle[None][:3]
        with pytest.raises(ServeError):
            await collect(engine, broken)
        # It gets that very row, and has fewer tokens than the keys and values, NaN throughout, that were in it.
        assert (await collect(engine, ask("past", max_tokens=4))).token_ids == oracle["past"][:4]
        async for chunk in stream:
            tokens += chunk.token_ids
        assert tokens == oracle["roman"][:20]

    asyncio.run(run())


# Rows and homes come and go.


def test_closing_a_stream_frees_its_row_for_a_waiting_request(engine: TransformersEngine) -> None:
    async def run() -> None:
        async with full_batch(engine) as streams:
            waiting = asyncio.create_task(collect(engine, ask("past", max_tokens=2)))
            await until(lambda: engine.health().num_waiting == 1)
            assert engine.health().num_running == MAX_BATCH
            assert not waiting.done()
            await streams[3].aclose()
            assert len((await waiting).token_ids) == 2
            await until(lambda: engine.health().num_running == MAX_BATCH - 1)
        await until(lambda: engine.health().num_running == 0)

    asyncio.run(run())


def test_cancelling_the_consumer_frees_running_and_waiting_requests(engine: TransformersEngine) -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(collect(engine, ask("past", max_tokens=400))) for _ in range(MAX_BATCH + 2)]
        await until(lambda: engine.health().num_running == MAX_BATCH and engine.health().num_waiting == 2)
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
        await until(lambda: (engine.health().num_running, engine.health().num_waiting) == (0, 0))

    asyncio.run(run())


def test_a_loop_that_closes_under_its_requests_leaves_the_engine_well(
    engine: TransformersEngine, oracle: dict[str | None, list[int]]
) -> None:
    loop = asyncio.new_event_loop()
    stream = engine.generate(ask("past", max_tokens=400, ignore_eos=True))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert answer(engine, ask("past", max_tokens=6))[0].token_ids == oracle["past"][:6]
    asyncio.run(until(lambda: engine.health().num_running == 0))


# Revisions.


@pytest.mark.slow
def test_two_revisions_of_one_adapter_in_one_batch_each_answer_as_their_own(
    engine: TransformersEngine, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    assert_two_revisions_answer_each_as_its_own(asyncio.Runner(), engine, homes, oracle)


@pytest.mark.slow
def test_a_revision_that_fails_is_refused_whole_and_leaves_the_one_before(
    engine: TransformersEngine, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    assert_a_broken_revision_changes_nothing(asyncio.Runner(), engine, homes, oracle)


def test_a_revision_that_does_not_fit_beside_the_one_before_is_refused_before_anything_of_it_is_loaded(
    engine: TransformersEngine, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    loaded = []

    def load(home: str) -> LoadedHome:
        loaded.append(home)
        return homes.load(home)

    async def run() -> None:
        before, new = set(engine.health().revisions), replace(swapped(homes, 7), load_home=load)
        with pytest.raises(BundleError, match=r"revision 7 is not taken up: its new homes need \d{7,}"):
            await engine.take_up(replace(new, sizes=dict.fromkeys(new.homes, 2**50)))
        assert not loaded
        assert set(engine.health().revisions) == before
        # What both have in common is there already, however large.
        await engine.take_up(Revision(7, serving_map(), tuple(CLUSTERS), load, dict.fromkeys(CLUSTERS, 2**50)))
        assert not loaded
        await engine.release(7)

    asyncio.Runner().run(run())
    assert answer(engine, ask("past", max_tokens=6))[0].token_ids == oracle["past"][:6]


@pytest.mark.slow
def test_a_revision_is_forgotten_once_nobody_runs_on_it(
    engine: TransformersEngine, homes: Homes, oracle: dict[str | None, list[int]]
) -> None:
    assert_release_lets_running_requests_finish(asyncio.Runner(), engine, homes, oracle)


def test_a_home_is_there_once_its_store_is_back(engine: TransformersEngine, homes: Homes, oracle) -> None:
    assert_taking_up_again_mends(asyncio.Runner(), engine, homes, oracle)


def test_what_two_revisions_have_in_common_is_resident_once(engine: TransformersEngine, homes: Homes) -> None:
    async def run() -> None:
        before = resident_numbers(engine)
        await engine.take_up(swapped(homes))
        load = swapped(homes).load_home
        cores = [own.cores for home in CLUSTERS for own in load(home).weights.values() if own.cores is not None]
        changed = sum(map(torch.numel, cores))
        changed += sum(len(own.U.flatten()) + len(own.V.flatten()) for own in load("factors:3.0").weights.values())
        assert resident_numbers(engine) - before == changed
        await engine.release(1)
        assert resident_numbers(engine) == before

    asyncio.run(run())


def resident_numbers(engine: TransformersEngine) -> int:
    """Of all homes, what several of them share counted once."""
    parts = [
        part
        for by_home in engine._linears._weights.values()
        for own in by_home.values()
        for part in (own.U, own.V, own.cores)
        if part is not None
    ]
    return sum({part.data_ptr(): part.numel() for part in parts}.values())


# The engine's own end.


def test_a_step_that_fails_ends_the_engine_with_its_reason(base_path: Path, homes: Homes, caplog) -> None:
    # A slot that no manifest would have let through: the gather of its core fails in the middle of a step.
    wrong = ServingMap("the-base", MappingProxyType({"wrong": served("wrong", "cluster:1", -7)}))
    engine = TransformersEngine(base_path, Revision(0, wrong, ("cluster:1",), homes.load), EngineSettings(max_batch=2))

    async def run() -> None:
        with pytest.raises(EngineStopped, match="has not been started"):
            await collect(engine, ask(None, max_tokens=400))
        await engine.start()
        bystander = engine.generate(ask(None, max_tokens=400))
        await anext(bystander)
        caplog.set_level(logging.CRITICAL, logger="serve_app")
        with pytest.raises(EngineStopped, match="a step failed: IndexError"):
            await collect(engine, ask("wrong", prompt="hi"))
        with pytest.raises(EngineStopped, match="a step failed"):
            async for _ in bystander:
                pass
        assert not engine.health().alive
        assert (engine.health().num_running, engine.health().num_waiting) == (0, 0)
        for refused in (collect(engine, ask(None)), engine.take_up(NOTHING), engine.release(0)):
            with pytest.raises(EngineStopped, match="a step failed"):
                await refused
        await engine.stop()

    asyncio.run(run())


def test_stop_ends_what_runs_and_what_waits(base_path: Path, homes: Homes) -> None:
    settings = EngineSettings(max_batch=1, max_model_len=64, dtype="bfloat16")
    engine = TransformersEngine(base_path, Revision(0, serving_map(), ("cluster:0",), homes.load), settings)

    async def run() -> None:
        await engine.start()
        text = (await collect(engine, ask("number-en", max_tokens=6))).text
        assert text.startswith(" four hundred and fifty\n")
        running = engine.generate(ask(None, ignore_eos=True, max_tokens=50))
        await anext(running)
        waiting = asyncio.create_task(collect(engine, ask("number-en")))
        await until(lambda: engine.health().num_waiting == 1)
        await engine.stop()
        assert not engine.health().alive
        with pytest.raises(EngineStopped, match="it was stopped"):
            async for _ in running:
                pass
        with pytest.raises(EngineStopped, match="it was stopped"):
            await waiting

    asyncio.run(run())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 1024}, "sliding_window is 1024"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 10, "sliding_window": 1024},
         "layers of type sliding_attention"),
        ({"max_position_embeddings": 1024}, "max_position_embeddings 1024"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e5, "original_max_position_embeddings": 1024,
                              "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}}, "beyond 1024 tokens"),
    ],
)  # fmt: skip
def test_a_base_the_loop_cannot_serve_rightly_is_refused_at_start(
    base_path: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    config = json.loads((base_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = TransformersEngine(tmp_path, NOTHING, EngineSettings(max_model_len=2048))
    with pytest.raises(ConfigError, match=message):
        asyncio.run(engine.start())
    assert not engine.health().alive


def test_a_base_with_missing_tensors_is_refused_rather_than_filled_with_noise(base_path: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(base_path, tmp_path / "base")
    tensors = load_file(base_path / "model.safetensors")
    del tensors["model.layers.7.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    for folder, message in (
        (tmp_path / "base", "model.layers.7.mlp.up_proj.weight"),
        (tmp_path / "no", "no such folder"),
    ):
        engine = TransformersEngine(folder, NOTHING, EngineSettings())
        with pytest.raises(BaseModelError, match=message):
            asyncio.run(engine.start())


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "tpu"},
        {"device": "mps"},
        {"dtype": "int8"},
        {"max_batch": 0},
        {"max_model_len": 1},
        {"num_threads": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EngineSettings(**wrong)
