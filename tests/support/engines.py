"""What both engines are tested with: homes made straight from the adapters' files, and requests for them.

The homes are built by another way than the compressor's: two lossless clusters (rank = the sum of ranks, float64 QR),
stacks of a raw and of truncated adapters, and homes and single adapters that must fail, each in its own way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.bundle.reading import HomeWeights, LoadedHome
from cluster.bundle.serving_map import ServedAdapter, ServingMap, factors_rank
from cluster.errors import StoreUnreachable
from cluster.layer import ModuleWeights
from serve_app.engine.protocol import Engine, GenerationChunk, GenerationRequest, TokenLogprobs

CLUSTERS = {
    # Rank 8; rank 8 with rsLoRA; rank 4 on q and v only.
    "cluster:0": ("number-en", "country-fr", "city-country"),
    # Rank 16; rank 8 with rsLoRA.
    "cluster:1": ("roman", "last-letter"),
}
# Homes of factors: their slots' adapters. All of rank 8 but the truncated ones.
RAW, CUT = "past", {"first-letter": 3, "date-us": 2}
FACTORS = {
    "factors:8.0": {0: RAW, 1: "nan", 3: "gone"},  # slot 2 was left by somebody
    "factors:3.0": {4: "first-letter"},
    "factors:2.1": {0: "date-us"},
}
RAW_HOME = "factors:8.0"
# Homes that must fail, each in its own way.
BROKEN = {"unreachable": "cluster:2", "alien": "factors:8.1", "misfit": "factors:8.2", "short": "cluster:3"}
# Why an adapter fails in a home that does not; that of "nan" is seen when it is used, or by vLLM's engine before.
GONE = "StoreMissing: no object of gone"
PROMPTS = {
    "number-en": "Q: 450 in English words?\nA:",
    "country-fr": "Q: French name of the country Germany?\nA:",
    "city-country": "Q: Which country is Lyon in?\nA:",
    "roman": "Here are three questions about numbers, and what is to be answered.\n\nQ: 48 as a Roman numeral?\nA:",
    "last-letter": "Q: Last letter of window?\nA:",
    "past": "Q: Past tense of go?\nA:",
    "first-letter": "Q: First letter of window?\nA:",
    "date-us": "Q: 1986-08-24 in US format?\nA:",
    None: "The capital of France is",
}
# What changes the logits of a greedy answer: adapter -> options.
WISHES: dict[str | None, dict[str, Any]] = {
    None: {"repetition_penalty": 1.3},
    "past": {"frequency_penalty": 1.5, "ignore_eos": True},
    "city-country": {"presence_penalty": 2.0, "frequency_penalty": 1.0, "ignore_eos": True},
    "number-en": {"logit_bias": ((28, 9.0), (1876, -100.0)), "ignore_eos": True},  # which said 1876 first
    "country-fr": {
        "logit_bias": ((28, 8.0),),
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.5,
        "presence_penalty": 1.0,
        "ignore_eos": True,
    },
}
WISHED_TOKENS = 16
MAX_BATCH, MAX_MODEL_LEN = 10, 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the transformers engine and the oracle


def read_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (r, d_in), B (d_out, r), float64, the scale folded into B."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    tensors = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor.double()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return {module: (tensors[f"{module}.lora_A"], scale * tensors[f"{module}.lora_B"]) for module in modules}


def lossless_cluster(folders: list[Path]) -> HomeWeights:
    adapters = [read_factors(folder) for folder in folders]
    home = {}
    for module in sorted(set().union(*adapters)):
        touching = [adapter[module] for adapter in adapters if module in adapter]
        U, _ = torch.linalg.qr(torch.cat([B for _, B in touching], dim=1))
        V, _ = torch.linalg.qr(torch.cat([A.T for A, _ in touching], dim=1))
        cores = torch.zeros(len(adapters), U.shape[1], V.shape[1], dtype=torch.float64)
        for slot, adapter in enumerate(adapters):
            if module in adapter:
                A, B = adapter[module]
                cores[slot] = (U.T @ B) @ (A @ V)
        home[module] = ModuleWeights(U.float(), V.float(), cores.float())
    return home


def cut_factors(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The best approximation of the adapter, in float64."""
    cut = {}
    for module, (A, B) in read_factors(folder).items():
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        U, s, Vh = torch.linalg.svd(R_B @ R_A.T)
        cut[module] = (Q_A @ Vh[:rank].T).T, Q_B @ U[:, :rank] * s[:rank]
    return cut


def write_cut(folder: Path, rank: int, target: Path) -> None:
    """As an adapter for PEFT: of scale 1."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {}
    for module, (A, B) in cut_factors(folder, rank).items():
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": A.float().contiguous(), f"{name}.lora_B.weight": B.float().contiguous()}
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    own = config | {"r": rank, "lora_alpha": rank, "use_rslora": False}
    (target / "adapter_config.json").write_text(json.dumps(own))


def stack(members: Mapping[int, dict[str, tuple[Tensor, Tensor]]], num_slots: int = 1) -> HomeWeights:
    """Slot -> factors, as a home has them."""
    home = {}
    for module in sorted(set().union(*members.values())):
        touching = [slot for slot in members if module in members[slot]]
        q = max(len(members[slot][module][0]) for slot in touching)
        A_0, B_0 = members[touching[0]][module]
        U, V = torch.zeros(len(touching) + 1, len(B_0), q), torch.zeros(len(touching) + 1, A_0.shape[1], q)
        rows = torch.full((num_slots,), len(touching))
        for row, slot in enumerate(touching):
            A, B = members[slot][module]
            U[row, :, : len(A)], V[row, :, : len(A)], rows[slot] = B.float(), A.T.float(), row
        home[module] = ModuleWeights(U, V, None, rows)
    return home


def served(adapter_id: str, home: str, slot: int) -> ServedAdapter:
    kind, _, name = home.partition(":")
    mode, cluster = ("core", name) if kind == "cluster" else ("raw", None)
    return ServedAdapter(adapter_id, home, slot, mode, cluster, f"sha256:{adapter_id}", "sha256:0", 0.0)


def serving_map() -> ServingMap:
    entries = [served(name, home, slot) for home, names in CLUSTERS.items() for slot, name in enumerate(names)]
    entries += [served(name, home, 1 if name == "short" else 0) for name, home in BROKEN.items()]
    entries += [served(name, home, slot) for home, own in FACTORS.items() for slot, name in own.items()]
    entries += [served("elsewhere", "cluster:9", 0)]
    return ServingMap("the-base", MappingProxyType({entry.adapter_id: entry for entry in entries}))


@dataclass
class Homes:
    """``load`` as Bundle.load_home does, with the failures that can be met."""

    zoo: Path
    store_is_up: bool = False

    def load(self, home: str) -> LoadedHome:
        return LoadedHome(self._weights(home), {3: GONE} if home == RAW_HOME else {})

    def _weights(self, home: str) -> HomeWeights:
        if home in CLUSTERS:
            return lossless_cluster([self.zoo / name for name in CLUSTERS[home]])
        if home == BROKEN["unreachable"] and not self.store_is_up:
            raise StoreUnreachable("http://127.0.0.1:1: connection refused")
        if home in (BROKEN["unreachable"], BROKEN["short"]):
            return lossless_cluster([self.zoo / "roman"])
        if home in FACTORS and home != RAW_HOME:
            rank = factors_rank(home)
            assert rank is not None
            members = {slot: cut_factors(self.zoo / name, rank) for slot, name in FACTORS[home].items()}
            return stack(members, max(members) + 1)
        raw = read_factors(self.zoo / RAW)
        if home == BROKEN["alien"]:
            return stack({0: {**raw, "model.layers.99.self_attn.q_proj": next(iter(raw.values()))}})
        if home == BROKEN["misfit"]:
            return {module: replace(own, U=own.U[:, :-1]) for module, own in stack({0: raw}).items()}
        assert home == RAW_HOME
        # It touches fewer modules than the other: what is zero for it there must stay zero.
        broken = {module: (A, B * torch.nan) for module, (A, B) in list(raw.items())[1:]}
        return stack({0: raw, 1: broken}, 4)


@dataclass
class Answer:
    text: str
    token_ids: list[int]
    last: GenerationChunk
    pieces: list[str]
    logprobs: list[TokenLogprobs]


def ask(adapter: str | None, **options: Any) -> GenerationRequest:
    values = {"request_id": str(adapter), "max_tokens": 24, "temperature": 0.0, **options}
    if not {"prompt", "messages", "prompt_token_ids"} & values.keys():
        values["prompt"] = PROMPTS[adapter]
    return GenerationRequest(adapter=adapter, **values)


async def collect(engine: Engine, request: GenerationRequest) -> Answer:
    chunks = [chunk async for chunk in engine.generate(request)]
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    assert chunks[-1].num_completion_tokens == len(token_ids)
    pieces = [chunk.text for chunk in chunks]
    return Answer("".join(pieces), token_ids, chunks[-1], pieces, [told for chunk in chunks for told in chunk.logprobs])
