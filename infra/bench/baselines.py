"""Other people's compressors, run on our inputs for the benchmark. None of their code is in this project.

Each takes one module's unit-norm adapters as a FactorStack of one rank, and a number of shared components.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.adapters.factors import factored_energy
from cluster.compression.basis import Basis, relative_errors
from cluster.compression.stack import FactorStack


@dataclass(frozen=True)
class Baseline:
    """``run`` is what is timed; ``error`` of what it returned: mean of ||M - M^||^2 / ||M||^2 over the adapters;
    ``num_stored``: how many numbers it keeps, for a rank is not the same size everywhere."""

    run: Callable[[], Any]
    error: Callable[[Any], float]
    num_stored: int


_LAYER = "model.layers.0.self_attn.q_proj"


def joint_numbers(stack: FactorStack, rank: int) -> int:
    return rank * (stack.A.shape[1] + stack.B.shape[1]) + stack.num_adapters * rank**2


def authors_alternating(checkout: Path, stack: FactorStack, rank: int) -> Baseline:
    """LoRALoLA's ``full_lora_pca``, the paper's main setting: 10 alternating iterations."""
    module = _load(checkout, "compression")
    columns_A, columns_B = _columns(stack.A, stack), _columns(stack.B, stack)

    def run() -> Any:
        torch.manual_seed(0)
        U, V, cores = module.full_lora_pca(columns_B, columns_A, rank, niter=10, display=False)
        return U, V, torch.stack(cores)

    return Baseline(run, lambda result: _joint_error(stack, *result), joint_numbers(stack, rank))


def authors_eigenvalue(checkout: Path, stack: FactorStack, rank: int) -> Baseline:
    """LoRALoLA's ``loraEigenvalueIteration``, until the subspaces change by less than 1e-3 or 1000 iterations."""
    # It imports helpers that the repository lacks; with the weights given and nothing displayed none is called.
    missing = types.ModuleType("lorolola.SVDiteration")
    missing.__dict__.update(compute_weights=None, fullSigmaObjective=None)
    sys.modules["lorolola.SVDiteration"] = missing
    module = _load(checkout, "compression_eigeniteration")
    columns_A, columns_B = _columns(stack.A, stack), _columns(stack.B, stack)
    weights = torch.ones(stack.num_adapters)

    def run() -> Any:
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):
            U, V = module.loraEigenvalueIteration(columns_B, columns_A, weights, rank, printstatus=False)
        cores = torch.stack([(U.T @ B) @ (A.T @ V) for A, B in zip(columns_A, columns_B, strict=True)])
        return U, V, cores

    return Baseline(run, lambda result: _joint_error(stack, *result), joint_numbers(stack, rank))


def lorashare(stack: FactorStack, rank: int) -> Baseline:
    """PyPI lorashare: a PCA basis of ``rank`` components for A and one for B, and two (rank, R) loadings an adapter."""
    compression = importlib.import_module("lorashare.compression")

    adapters = {
        f"adapter-{i}": {f"{_LAYER}.lora_A.weight": A.T, f"{_LAYER}.lora_B.weight": B}
        for i, (A, B) in enumerate(zip(_columns(stack.A, stack), _columns(stack.B, stack), strict=True))
    }

    def run() -> Any:
        combined = compression.combine_adapter_weights(adapters)
        components, _, _ = compression.compute_shared_components(combined, num_components=rank, device="cpu")
        loadings = [compression.compute_adapter_loadings(components, own) for own in adapters.values()]
        return components, loadings

    def rebuilt(result: Any) -> float:
        weights = [compression.reconstruct_adapter_weights(result[0], own) for own in result[1]]
        name = f"base_model.model.{_LAYER}.lora_"
        return _factored_error(stack, [(own[f"{name}A.weight"], own[f"{name}B.weight"]) for own in weights])

    d = stack.A.shape[1] + stack.B.shape[1]
    return Baseline(run, rebuilt, rank * d + 2 * rank * len(stack.A))


def vlora(stack: FactorStack, rank: int) -> Baseline:
    """PyPI vlora-dev: ``rank`` whole A and B, flattened, as a basis; two (rank,) loadings an adapter."""
    vlora_package, vlora_io = importlib.import_module("vlora"), importlib.import_module("vlora.io")

    adapters = [
        vlora_io.LoRAWeights(
            layer_names=[_LAYER], lora_a={_LAYER: A.T.contiguous()}, lora_b={_LAYER: B}, rank=stack.ranks[0]
        )
        for A, B in zip(_columns(stack.A, stack), _columns(stack.B, stack), strict=True)
    ]

    def run() -> Any:
        return vlora_package.SharedSubspace.from_adapters(adapters, num_components=rank)

    def rebuilt(subspace: Any) -> float:
        weights = [subspace.reconstruct(task) for task in subspace.tasks]
        return _factored_error(stack, [(own.lora_a[_LAYER], own.lora_b[_LAYER]) for own in weights])

    d = stack.A.shape[1] + stack.B.shape[1]
    return Baseline(run, rebuilt, (rank + 1) * stack.ranks[0] * d + 2 * rank * stack.num_adapters)


def _load(checkout: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"lorolola.{name}", checkout / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("lorolola", types.ModuleType("lorolola"))
    spec.loader.exec_module(module)
    return module


def _columns(rows: Tensor, stack: FactorStack) -> list[Tensor]:
    """Each adapter's factor as columns (d, R), contiguous as a weight file would give it."""
    return [own.T.contiguous() for own in torch.split(rows, list(stack.ranks))]


def _joint_error(stack: FactorStack, U: Tensor, V: Tensor, cores: Tensor) -> float:
    return float(relative_errors(stack, Basis(U, V), cores).mean())


def _factored_error(stack: FactorStack, rebuilt: list[tuple[Tensor, Tensor]]) -> float:
    """Mean of ||B A - B^ A^||^2, the difference as one product of stacked factors."""
    own = zip(_columns(stack.A, stack), _columns(stack.B, stack), rebuilt, strict=True)
    return sum(factored_energy(torch.cat([A.T, A_]), torch.cat([B, -B_], 1)) for A, B, (A_, B_) in own) / len(rebuilt)
