"""A basis shared by the adapters of a cluster at one module, and how much of each of them it holds.

Legend as in stack.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.compression.stack import FactorStack


@dataclass(frozen=True)
class Basis:
    """U (d_out, r_U), V (d_in, r_V), float32 until stored. Of JD-Full: orthonormal columns, r_U = r_V but where the
    rank exceeds a side of the module. Of JD-Diag: columns of norm 1, r_U = r_V always."""

    U: Tensor
    V: Tensor

    def rounded(self, dtype: torch.dtype) -> Basis:
        """As it will be read back from storage in ``dtype``, in float32."""
        return Basis(self.U.to(dtype).float(), self.V.to(dtype).float())


def unit_cores(stack: FactorStack, basis: Basis) -> Tensor:
    """S_i = U^T M_i V / ||M_i||: the best cores (n, r_U, r_V) of the stack's unit-norm adapters, float32."""
    return stack.padded(stack.B @ basis.U).mT @ stack.padded(stack.A @ basis.V)


def captured_energy(stack: FactorStack, basis: Basis) -> Tensor:
    """||U^T M_i V||^2 / ||M_i||^2 (n,), float64: for orthonormal U, V the error is one minus this."""
    return unit_cores(stack, basis).double().square().sum((1, 2))


def unit_diagonals(stack: FactorStack, basis: Basis) -> Tensor:
    """diag(U^T M_i V) / ||M_i|| (n, r), float32, for U and V of equally many columns; O(r) an adapter's row."""
    return stack.padded((stack.B @ basis.U) * (stack.A @ basis.V)).sum(1)


def relative_errors(stack: FactorStack, basis: Basis, cores: Tensor) -> Tensor:
    """||M_i - U S_i V^T||^2 / ||M_i||^2 (n,), float64, clamped at 0.

    Holds for any U, V and unit-norm cores (n, r_U, r_V), or (n, r) for S_i = diag(s_i), so also for those that
    storage has rounded: 1 - 2 <U^T M_i V, S_i> + <S_i, U^T U S_i V^T V>, which for diagonal cores is
    1 - 2 <diag(U^T M_i V), s_i> + s_i^T [(U^T U) o (V^T V)] s_i. (Float32 products leave about 1e-6 below zero.)
    """
    S = cores.double()
    U, V = basis.U.double(), basis.V.double()
    if S.dim() == 2:
        cross = (unit_diagonals(stack, basis).double() * S).sum(1)
        own = (S @ ((U.T @ U) * (V.T @ V)) * S).sum(1)
    else:
        cross = (unit_cores(stack, basis).double() * S).sum((1, 2))
        own = (S * ((U.T @ U) @ S @ (V.T @ V))).sum((1, 2))
    return (1 - 2 * cross + own).clamp_min(0)
