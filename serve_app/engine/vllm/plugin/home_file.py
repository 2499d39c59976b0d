"""A home on its way from the engine to vLLM's workers: a folder of safetensors on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from cluster.layer import ModuleWeights

_FILE = "home.safetensors"


def write_home(folder: Path, weights: Mapping[str, ModuleWeights]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for module, own in weights.items():
        # V^T of a stack: so it lies in memory.
        tensors |= {f"{module}.U": own.U, f"{module}.V": own.V if own.rows is None else own.V.mT}
        if own.cores is not None:
            tensors[f"{module}.cores"] = own.cores
        if own.rows is not None:
            tensors[f"{module}.rows"] = own.rows
    # Cloned, for safetensors refuses tensors that share memory.
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, folder / _FILE
    )


def read_home(folder: Path) -> dict[str, ModuleWeights]:
    tensors = load_file(folder / _FILE)
    weights = {}
    for module in sorted({name.rpartition(".")[0] for name in tensors}):
        U, V, rows = tensors[f"{module}.U"], tensors[f"{module}.V"], tensors.get(f"{module}.rows")
        weights[module] = ModuleWeights(U, V if rows is None else V.mT, tensors.get(f"{module}.cores"), rows)
    return weights
