"""What both engines are tested with: homes made straight from the adapters' files, and requests for them.

The homes are built by another way than the compressor's: two lossless clusters (rank = the sum of ranks, float64 QR),
one adapter served from its own factors, and homes that must fail, each in its own way.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cluster.bundle.reading import HomeWeights
from cluster.bundle.serving_map import ServedAdapter, ServingMap
from cluster.errors import StoreUnreachable
from cluster.layer import ModuleWeights
from serve_app.engine.protocol import Engine, GenerationChunk, GenerationRequest

CLUSTERS = {
    # Rank 8; rank 8 with rsLoRA; rank 4 on q and v only.
    "cluster:0": ("number-en", "country-fr", "city-country"),
    # Rank 16; rank 8 with rsLoRA.
    "cluster:1": ("roman", "last-letter"),
}
RAW = "past"
# Homes that must fail, each in its own way, and one that only fails when it is used.
BROKEN = {"unreachable": "cluster:2", "alien": "factors:alien", "misfit": "factors:misfit", "short": "cluster:3"}
NAN = "factors:nan"
PROMPTS = {
    "number-en": "Q: 450 in English words?\nA:",
    "country-fr": "Q: French name of the country Germany?\nA:",
    "city-country": "Q: Which country is Lyon in?\nA:",
    "roman": "Here are three questions about numbers, and what is to be answered.\n\nQ: 48 as a Roman numeral?\nA:",
    "last-letter": "Q: Last letter of window?\nA:",
    "past": "Q: Past tense of go?\nA:",
    None: "The capital of France is",
}
MAX_BATCH, MAX_MODEL_LEN = 8, 512
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


def raw_home(folder: Path) -> HomeWeights:
    return {module: ModuleWeights(B.float(), A.T.float(), None) for module, (A, B) in read_factors(folder).items()}


def served(adapter_id: str, home: str, slot: int) -> ServedAdapter:
    kind, _, name = home.partition(":")
    mode, cluster = ("core", name) if kind == "cluster" else ("raw", None)
    return ServedAdapter(adapter_id, home, slot, mode, cluster, "sha256:0", "sha256:0", 0.0)


def serving_map() -> ServingMap:
    entries = [served(name, home, slot) for home, names in CLUSTERS.items() for slot, name in enumerate(names)]
    entries += [served(name, home, 1 if name == "short" else 0) for name, home in BROKEN.items()]
    entries += [served(RAW, f"factors:{RAW}", 0), served("nan", NAN, 0), served("elsewhere", "cluster:9", 0)]
    return ServingMap("the-base", MappingProxyType({entry.adapter_id: entry for entry in entries}))


@dataclass
class Homes:
    """``load`` as Bundle.load_home does, with the failures that can be met."""

    zoo: Path
    store_is_up: bool = False

    def load(self, home: str) -> HomeWeights:
        if home in CLUSTERS:
            return lossless_cluster([self.zoo / name for name in CLUSTERS[home]])
        raw = raw_home(self.zoo / RAW)
        if home == BROKEN["unreachable"]:
            if not self.store_is_up:
                raise StoreUnreachable("http://127.0.0.1:1: connection refused")
            return lossless_cluster([self.zoo / "roman"])
        if home == BROKEN["alien"]:
            return {**raw, "model.layers.99.self_attn.q_proj": next(iter(raw.values()))}
        if home == BROKEN["misfit"]:
            return {module: replace(weights, U=weights.U[:-1]) for module, weights in raw.items()}
        if home == BROKEN["short"]:
            return lossless_cluster([self.zoo / "roman"])
        if home == NAN:
            return {module: replace(weights, U=weights.U * torch.nan) for module, weights in raw.items()}
        assert home == f"factors:{RAW}"
        return raw


@dataclass
class Answer:
    text: str
    token_ids: list[int]
    last: GenerationChunk
    pieces: list[str]


def ask(adapter: str | None, **options: Any) -> GenerationRequest:
    values = {"request_id": str(adapter), "max_tokens": 32, "temperature": 0.0, **options}
    if not {"prompt", "messages", "prompt_token_ids"} & values.keys():
        values["prompt"] = PROMPTS[adapter]
    return GenerationRequest(adapter=adapter, **values)


async def collect(engine: Engine, request: GenerationRequest) -> Answer:
    chunks = [chunk async for chunk in engine.generate(request)]
    assert [chunk.finish_reason is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    token_ids = [token for chunk in chunks for token in chunk.token_ids]
    assert chunks[-1].num_completion_tokens == len(token_ids)
    pieces = [chunk.text for chunk in chunks]
    return Answer("".join(pieces), token_ids, chunks[-1], pieces)
