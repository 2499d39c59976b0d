"""The LoRA factors of several adapters, stacked, on the linear layers of one base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cluster.adapters.factors import Factors
from infra.train_zoo.plan import LoraShape


class StackedLora(nn.Module):
    """x (n, L, d_in) -> W x + s_i B_i A_i x on line i, with A (n, R, d_in) and B (n, d_out, R) in float32.

    An adapter of a lower rank than R, or without this module, has zeros there. They stay zero: the gradient of either
    factor's part is a product with the other's.
    """

    def __init__(self, base: nn.Linear, factors: Sequence[Factors | None], scales: Sequence[float]) -> None:
        super().__init__()
        self.base = base
        rank = max(len(pair[0]) for pair in factors if pair is not None)
        device = base.weight.device
        A = torch.zeros(len(factors), rank, base.in_features)
        B = torch.zeros(len(factors), base.out_features, rank)
        for i, pair in enumerate(factors):
            if pair is not None:
                A[i, : len(pair[0])], B[i, :, : len(pair[0])] = pair
        self.A, self.B = nn.Parameter(A.to(device)), nn.Parameter(B.to(device))
        self.scales = torch.tensor(scales, device=device).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.A.to(x.dtype), (self.B * self.scales).to(x.dtype)
        return torch.baddbmm(self.base(x), x @ A.mT, B.mT)

    def of(self, i: int, rank: int) -> Factors:
        """A (rank, d_in) and B (d_out, rank) of adapter ``i``, float32, without the scale; on the CPU."""
        return self.A[i, :rank].detach().cpu(), self.B[i, :, :rank].detach().cpu()


def draw_factors(model: nn.Module, shape: LoraShape, seed: int) -> dict[str, Factors]:
    """Module -> A, B as PEFT draws them after torch.manual_seed(seed): B is zero. On the CPU, so that a seed means the
    same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in shape.modules:
            A = torch.empty(shape.rank, module.in_features)
            B = torch.empty(module.out_features, shape.rank)
            # PEFT makes two nn.Linear, which draw for themselves, and draws A again.
            for factor in (A, B, A):
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
            factors[name] = A, torch.zeros_like(B)
    return factors


def scale_of(shape: LoraShape) -> float:
    return shape.alpha / (math.sqrt(shape.rank) if shape.rslora else shape.rank)


def stack_on(model: nn.Module, shapes: Sequence[LoraShape], seeds: Sequence[int]) -> dict[str, StackedLora]:
    """Fresh adapters, one a line of the batches to come: module -> their factors."""
    drawn = [draw_factors(model, shape, seed) for shape, seed in zip(shapes, seeds, strict=True)]
    scales = [scale_of(shape) for shape in shapes]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = [name for name in linears if any(name in factors for factors in drawn)]
    return {name: StackedLora(linears[name], [factors.get(name) for factors in drawn], scales) for name in names}


@contextmanager
def in_place(model: nn.Module, stacked: Mapping[str, StackedLora]) -> Iterator[None]:
    """While it lasts, the modules named answer with their adapters."""
    try:
        for name, module in stacked.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in stacked.items():
            model.set_submodule(name, module.base)
