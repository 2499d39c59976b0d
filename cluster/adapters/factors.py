"""An adapter's factors at one module, and the energy of their product, which is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float32).eps
Factors = tuple[Tensor, Tensor]
"""(A (r, d_in), B (d_out, r)), float32, the scale folded into B: the module's change is M = B A."""


def factored_energy(A: Tensor, B: Tensor) -> float:
    """||B A||_F^2 = tr((B^T B)(A A^T)), in float64; A (r, d_in), B (d_out, r). The product is never formed.

    0 where B A cancels to less than the rounding of float32 factors: nothing of it is left in them, and the
    trace, itself a rounding error then, may even come out negative.
    """
    A, B = A.double(), B.double()
    return gram_energy(A @ A.T, B.T @ B)


def gram_energy(gram_A: Tensor, gram_B: Tensor) -> float:
    """``factored_energy`` from A A^T and B^T B, (r, r) float64."""
    energy = float((gram_A * gram_B).sum())
    without_cancelling = float((gram_A.diagonal() * gram_B.diagonal()).sqrt().sum())
    return energy if energy > (_EPSILON * without_cancelling) ** 2 else 0.0
