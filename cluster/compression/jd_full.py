"""Joint diagonalisation (JD-Full) of one module's adapters: M_i ~ U S_i V^T with shared U, V.

arXiv 2407.00066: min over U, V, S_i of sum_i w_i ||M_i - U S_i V^T||_F^2 with orthonormal columns of U, V and
w_i = 1 / ||M_i||^2, by the eigenvalue iteration, shifted. With P_i = A_i V and Q_i = B_i U a step is, in factored
form, two products with all factors at once and small batched ones:

    V <- likewise with the U at hand:                        sum_i A_i^T Q_i Q_i^T P_i
    U <- qr(G U - s U),  G U = sum_i w_i M_i V V^T M_i^T U = sum_i B_i^T P_i P_i^T Q_i,  s = 0.4 lambda_min(U^T G U)

The paper's iteration has s = 0. The shift costs nothing and saves steps where the spectrum of G is flat, as it is for
many adapters: the rate of convergence rho = lambda_{r+1} / lambda_r becomes (rho - 0.4) / 0.6.

A step never loses energy. In coordinates of U and its complement let G = [[D, C^T], [C, E]], E >= 0, D >= 2 s. The
new U spans [I; X] with X = C (D - s)^-1. With K = X^T X the captured energy tr(U^T G U) grows by at least
tr(K (I + K)^-1 (D - 2 s)) >= 0.

Nearly all of the work is products with all factors, and most steps do without them: the iteration begins with each
adapter's largest singular values alone (``leading``), where it comes to within a few steps of its end.

Legend as in stack.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.compression.basis import Basis
from cluster.compression.stack import FactorStack
from cluster.compression.svd import truncate_all

MAX_ITERATIONS = 30
# On what a step takes off the mean error. The change of the subspaces is no criterion: where the spectrum is flat, or
# rank is to spare, they turn for ever at an error that has long stopped falling.
TOLERANCE = 1e-4
# Singular values of each adapter that the first steps see, at least. One was not clearly better in time or error.
LEADING_RANK = 2
# Of lambda_min: at most a half. There, and with directions that G does not reach, the iteration stands still.
SHIFT = 0.4


def jd_full(stack: FactorStack, rank: int, seed: int) -> Basis:
    """The basis that captures most of the stack's energy: r_U = min(rank, T, d_out), r_V = min(rank, T, d_in).

    Each side has its own bound, so that rank >= T is lossless for every module: one bound for both would
    cut the wider side of a narrow module (k and v under grouped-query attention).
    Deterministic in (stack, rank, seed) on one machine and thread count.
    """
    T = sum(stack.ranks)
    r_U, r_V = min(rank, T, stack.B.shape[1]), min(rank, T, stack.A.shape[1])
    if r_U == min(T, stack.B.shape[1]) and r_V == min(T, stack.A.shape[1]):
        # All that the stack spans is kept: nothing to iterate for, and products of products would cost digits.
        return Basis(_orthonormal(stack.B.T), _orthonormal(stack.A.T))
    small = leading(stack, rank)
    if small is None:
        return _iterate(stack, _random_basis(stack, r_U, r_V, seed))
    return _iterate(stack, _iterate(small, _random_basis(small, r_U, r_V, seed)))


def leading(stack: FactorStack, rank: int) -> FactorStack | None:
    """The stack truncated to q singular values an adapter, q = 2 or what gives twice ``rank`` of them; None where that
    is more than half of the stack's rows, and no saving."""
    q = max(LEADING_RANK, -(-2 * rank // stack.num_adapters))
    kept = sum(min(q, own) for own in stack.ranks)
    return truncate_all(stack, q) if 2 * rank <= kept <= sum(stack.ranks) / 2 else None


def _random_basis(stack: FactorStack, r_U: int, r_V: int, seed: int) -> Basis:
    """Random mixes of the factors' own rows, not of all of space: at r = T these are already the whole span."""
    T, generator, device = len(stack.A), torch.Generator().manual_seed(seed), stack.A.device
    V = _orthonormal(_mixed(torch.randn(T, r_V, generator=generator).to(device), stack.A))
    P = stack.padded(stack.A @ V)
    Q = stack.padded(torch.randn(T, r_U, generator=generator).to(device))
    return Basis(_orthonormal(_mixed(stack.unpadded(P @ (P.mT @ Q)), stack.B)), V)


def _iterate(stack: FactorStack, start: Basis) -> Basis:
    """Steps from ``start``, one at least, until one gains next to nothing."""
    U, V = start.U, start.V
    P = stack.padded(stack.A @ V)
    captured = -math.inf
    for _ in range(MAX_ITERATIONS):
        Q = stack.padded(stack.B @ U)
        turn_V = _Turn.of(P, Q)
        before, captured = captured, turn_V.captured
        if captured - before <= TOLERANCE * stack.num_adapters:
            break
        V = turn_V.apply(stack, stack.A, V)
        P = stack.padded(stack.A @ V)
        U = _Turn.of(Q, P).apply(stack, stack.B, U)
    return Basis(U, V)


@dataclass(frozen=True)
class _Turn:
    """Half a step, of the side whose projections are ``own`` (n, R, r), the other side's ``other`` (n, R, r')."""

    weights: Tensor  # (n, R, r): G U = sum_i B_i^T weights_i
    gram: Tensor  # (r, r): U^T G U

    @staticmethod
    def of(own: Tensor, other: Tensor) -> _Turn:
        R, r = other.shape[1:]
        weights = (other @ other.mT) @ own if r > R else other @ (other.mT @ own)
        return _Turn(weights, own.flatten(0, 1).T @ weights.flatten(0, 1))

    @property
    def captured(self) -> float:
        return float(self.gram.trace())

    def apply(self, stack: FactorStack, rows: Tensor, columns: Tensor) -> Tensor:
        product = _mixed(stack.unpadded(self.weights), rows)
        shift = torch.linalg.eigvalsh(self.gram)[0].clamp_min(0) * SHIFT
        return _orthonormal(product - shift * columns)


def _mixed(weights: Tensor, rows: Tensor) -> Tensor:
    """rows^T weights (d, r). As (weights^T rows)^T: half as fast again on CPU, and in the layout that QR works on."""
    return (weights.T @ rows).T


def _orthonormal(columns: Tensor) -> Tensor:
    # Householder QR: orthonormal even where the columns are dependent.
    orthonormal: Tensor = torch.linalg.qr(columns).Q
    return orthonormal
