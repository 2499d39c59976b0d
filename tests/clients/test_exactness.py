"""From PEFT folders through job, bundle and HTTP: every answer is token for token what PEFT itself says.

Lossless against the original adapters, lossy against the adapters as exported from the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import openai
import pytest

from cluster.bundle.export import export_adapter
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import manifest_key
from cluster.hashing import canonical_json
from tests.support.jobs import FEW, copy_adapters, run_job
from tests.support.serving import Peft, application, ask, ask_all_at_once, ray_with_serve

pytestmark = pytest.mark.slow

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
RAW = "date-us"
NUM_TOKENS = 32
# Of different lengths, and not the adapters' own questions alone.
PROMPTS = {
    BASE: "The three largest cities of Japan are",
    "number-en": "Q: 450 in English words?\nA:",
    "first-letter": "Q: First letter of elephant?\nA:",
    "roman": "Q: 636 as a Roman numeral?\nA:",
    "city-country": "Q: Which country is Meknes in?\nA:",
    "country-fr": "Write a short story about a dog who learns to count.\n",
    "past": "Q: Past tense of harrow?\nA:",
    RAW: "Q: 1986-08-24 in US format?\nA:",
}
LOSSY = tuple(name for name in PROMPTS if name not in (BASE, RAW))


@pytest.fixture(scope="module")
def peft(base_path: Path) -> Peft:
    return Peft(base_path)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ray_with_serve() as port:
        yield port


@pytest.fixture(scope="module")
def adapters(zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_adapters(zoo_path, tmp_path_factory.mktemp("adapters"), (*FEW, RAW))


@pytest.fixture(scope="module")
def lossy(port: int, adapters: Path, base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Adapters on three bases, one raw, and the worst one truncated: the gate lies just below its error."""
    ungated, out = (tmp_path_factory.mktemp(name) for name in ("ungated", "lossy"))
    options = {"clusters": 3, "rank": 8, "raw": (RAW,)}
    manifest = run_job(adapters, base_path, ungated, gate=1.0, **options).manifest
    *_, second, worst = sorted(adapter.error for adapter in manifest.adapters.values())
    run_job(adapters, base_path, out, gate=(second + worst) / 2, **options)
    bundle = Bundle.open(str(out))
    assert len(bundle.manifest.clusters) == 3
    modes = sorted(adapter.mode for adapter in bundle.manifest.adapters.values())
    assert modes == ["core"] * (len(LOSSY) - 1) + ["raw", "truncated"]
    assert max(adapter.error for adapter in bundle.manifest.adapters.values()) > 0.01, "not lossy"
    return bundle


@pytest.fixture(scope="module")
def lossy_answers(lossy: Bundle, peft: Peft, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """PEFT's, each adapter as exported."""
    answers = {BASE: peft.answer(None, PROMPTS[BASE], NUM_TOKENS)}
    for name in (*LOSSY, RAW):
        folder = tmp_path_factory.mktemp("export") / name
        export_adapter(lossy, name, folder)
        answers[name] = peft.answer(folder, PROMPTS[name], NUM_TOKENS)
    return answers


def test_lossless_answers_are_pefts_alone_and_all_in_one_batch(
    port: int, adapters: Path, base_path: Path, peft: Peft, tmp_path: Path
) -> None:
    outcome = run_job(adapters, base_path, tmp_path / "out", clusters=1, rank=64, dtype="float32", raw=(RAW,))
    assert [outcome.manifest.adapters[name].mode for name in FEW] == ["core"] * len(FEW)
    assert outcome.manifest.adapters[RAW].mode == "raw"
    expected = {
        name: peft.answer(None if name == BASE else adapters / name, prompt, NUM_TOKENS)
        for name, prompt in PROMPTS.items()
    }
    assert len(set(expected.values())) == len(expected)
    with application(port, bundle=str(tmp_path / "out"), base=str(base_path), device="cpu", dtype="float32") as client:
        assert {name: ask(client, name, prompt, NUM_TOKENS) for name, prompt in PROMPTS.items()} == expected
        assert ask_all_at_once(client, PROMPTS, NUM_TOKENS) == expected


@pytest.mark.by_hand
@pytest.mark.parametrize("clusters_per_group", ["auto", 1])
def test_lossy_answers_are_pefts_with_the_exported_adapters(
    port: int, lossy: Bundle, lossy_answers: dict[str, str], base_path: Path, clusters_per_group: object
) -> None:
    with served(port, lossy, base_path, clusters_per_group=clusters_per_group) as client:
        assert {name: ask(client, name, prompt, NUM_TOKENS) for name, prompt in PROMPTS.items()} == lossy_answers
        assert ask_all_at_once(client, PROMPTS, NUM_TOKENS) == lossy_answers


@pytest.mark.by_hand
@pytest.mark.parametrize("swap", ["slots", "clusters"])
def test_the_comparison_sees_two_swapped_slots_and_two_swapped_clusters(
    port: int, lossy: Bundle, lossy_answers: dict[str, str], base_path: Path, swap: str
) -> None:
    """The tests above can fail: a map with two adapters swapped answers otherwise, for just those."""
    tampered, swapped = tamper(lossy, swap)
    with served(port, tampered, base_path) as client:
        answers = ask_all_at_once(client, PROMPTS, NUM_TOKENS)
    wrong = {name for name, answer in answers.items() if answer != lossy_answers[name]}
    assert wrong
    assert wrong <= swapped


def served(port: int, bundle: Bundle, base_path: Path, **placement: object) -> AbstractContextManager[openai.OpenAI]:
    return application(
        port,
        bundle=bundle.address,
        revision=bundle.manifest.revision,
        base=str(base_path),
        device="cpu",
        dtype="float32",
        placement=placement,
    )


def tamper(bundle: Bundle, swap: str) -> tuple[Bundle, set[str]]:
    """A further revision of the bundle, alike but for two slots of one cluster, or two clusters' places, swapped;
    and whose answers that concerns."""
    document = json.loads(bundle.manifest.to_json())
    adapters = {name: entry for name, entry in document["adapters"].items() if entry["mode"] == "core"}
    by_cluster: dict[str, list[str]] = {}
    for name, entry in adapters.items():
        by_cluster.setdefault(entry["cluster"], []).append(name)
    if swap == "slots":
        pair = next(names for names in by_cluster.values() if len(names) >= 2)[:2]
        entries = [adapters[name] for name in pair]
        entries[0]["slot"], entries[1]["slot"] = entries[1]["slot"], entries[0]["slot"]
        swapped = set(pair)
    else:
        first, second = [cluster for cluster, names in by_cluster.items() if names][:2]
        size = min(len(by_cluster[first]), len(by_cluster[second]))
        for name in by_cluster[first][:size]:
            adapters[name]["cluster"] = second
        for name in by_cluster[second][:size]:
            adapters[name]["cluster"] = first
        # Slots were 0, 1, ... in order, so those beyond the smaller cluster's size stay where they are.
        swapped = {name for cluster in (first, second) for name in by_cluster[cluster][:size]}
    document["revision"] = 1 if swap == "slots" else 2
    key = manifest_key(bundle.manifest.bundle, document["revision"])
    bundle.store.write(key, canonical_json(document))
    return Bundle.open(bundle.address, document["revision"]), swapped
