"""The other way to compute: every M_i = B_i A_i formed densely, in float64 numpy; and random adapters for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.compression.stack import FactorStack, stack_factors

Factors = tuple[Tensor, Tensor]
Dense = NDArray[np.float64]


def dense(factors: Factors) -> Dense:
    """M = B A (d_out, d_in)."""
    A, B = factors
    return B.double().numpy() @ A.double().numpy()


def stack_of(adapters: Sequence[Factors]) -> FactorStack:
    stack = stack_factors(list(enumerate(adapters)))
    assert stack is not None
    return stack


def random_adapters(ranks: Sequence[int], d_out: int, d_in: int, seed: int) -> list[Factors]:
    """Independent Gaussian factors."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)) for rank in ranks
    ]


def related_adapters(
    count: int, rank: int, shared: int, d_out: int, d_in: int, seed: int, noise: float = 0.1
) -> list[Factors]:
    """Adapters whose factors lie in one pair of ``shared``-dimensional subspaces, up to noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shared, d_in, generator=generator)
    columns = torch.randn(d_out, shared, generator=generator)
    adapters = []
    for A_noise, B_noise in random_adapters([rank] * count, d_out, d_in, seed + 1):
        mix_A, mix_B = torch.randn(rank, shared, generator=generator), torch.randn(shared, rank, generator=generator)
        level = noise * shared**0.5
        adapters.append((mix_A @ rows + level * A_noise, columns @ mix_B + level * B_noise))
    return adapters


def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
