"""Joint diagonalisation (JD-Full) of one module's adapters: M_i ~ U S_i V^T with shared U, V.

arXiv 2407.00066: min over U, V, S_i of sum_i w_i ||M_i - U S_i V^T||_F^2 with orthonormal columns of U, V and
w_i = 1 / ||M_i||^2, by the eigenvalue iteration. With P_i = A_i V and Q_i = B_i^T U a step is, in factored
form, two products with all factors at once and small batched ones:

    U <- qr(sum_i w_i M_i V V^T M_i^T U) = qr(sum_i B_i P_i P_i^T Q_i)
    V <- qr(sum_i w_i M_i^T U U^T M_i V) = qr(sum_i A_i^T Q_i Q_i^T P_i)     with the new U: monotone

Legend as in factors.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.factors import FactorStack

MAX_ITERATIONS = 30
# On the captured energy. The change of the subspaces is no criterion: where the spectrum is flat, or rank is
# to spare, they turn for ever at an error that has long stopped falling.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Basis:
    """U (d_out, r_U), V (d_in, r_V), float32 until stored. Of JD-Full: orthonormal columns, r_U = r_V but where the
    rank exceeds a side of the module. Of JD-Diag: columns of norm 1, r_U = r_V always."""

    U: Tensor
    V: Tensor

    def rounded(self, dtype: torch.dtype) -> Basis:
        """As it will be read back from storage in ``dtype``, in float32."""
        return Basis(self.U.to(dtype).float(), self.V.to(dtype).float())


def jd_full(stack: FactorStack, rank: int, seed: int) -> Basis:
    """The basis that captures most of the stack's energy: r_U = min(rank, T, d_out), r_V = min(rank, T, d_in).

    Each side has its own bound, so that rank >= T is lossless for every module: one bound for both would
    cut the wider side of a narrow module (k and v under grouped-query attention).
    Deterministic in (stack, rank, seed) on one machine and thread count.
    """
    T = sum(stack.ranks)
    r_U, r_V = min(rank, T, stack.B.shape[1]), min(rank, T, stack.A.shape[1])
    generator = torch.Generator().manual_seed(seed)
    # A random mix of the factors' own rows, not of all of space: at r = T this is already the whole span.
    U = _orthonormal(stack.B.T @ torch.randn(T, r_U, generator=generator))
    V = _orthonormal(stack.A.T @ torch.randn(T, r_V, generator=generator))
    P = stack.padded(stack.A @ V)
    captured = 0.0
    for _ in range(MAX_ITERATIONS):
        Q = stack.padded(stack.B @ U)
        U = _orthonormal(stack.B.T @ stack.unpadded(P @ (P.mT @ Q)))
        Q = stack.padded(stack.B @ U)
        V = _orthonormal(stack.A.T @ stack.unpadded(Q @ (Q.mT @ P)))
        P = stack.padded(stack.A @ V)
        before, captured = captured, float((Q.mT @ P).double().square().sum())
        if captured - before <= TOLERANCE * captured:
            break
    return Basis(U, V)


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


def _orthonormal(columns: Tensor) -> Tensor:
    # Householder QR: orthonormal even where the columns are dependent.
    orthonormal: Tensor = torch.linalg.qr(columns).Q
    return orthonormal
