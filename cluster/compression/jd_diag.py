"""Joint diagonalisation with diagonal cores (JD-Diag) of one module's adapters: M_i ~ U diag(s_i) V^T.

arXiv 2407.00066: min over U, V, s_i of sum_i w_i ||M_i - U diag(s_i) V^T||_F^2 with free U, V and w_i = 1 / ||M_i||^2,
by alternating least squares. With P = A V, Q = B U (T, r), S = [s_i] (n, r) and o the elementwise product, a step is,
in factored form, four products with all factors at once and three r x r solves:

    S <- [diag(U^T M_i V)]_i  [(U^T U) o (V^T V)]^-1       diag(U^T M_i V) = sum over the adapter's rows of P o Q
    U <- [sum_i M_i V diag(s_i)]    [(V^T V) o (S^T S)]^-1
    V <- [sum_i M_i^T U diag(s_i)]  [(U^T U) o (S^T S)]^-1      with the new U

Columns of U and V are kept at norm 1, so all scale is in the cores, as it is in JD-Full. (The paper balances the two
matrices as wholes; column by column costs the same, the steps do not see it, and no column is ever small beside
another.)

Trap: the best diagonal cores need not exist. Rank-one terms may grow without bound while they cancel each other,
which ends in rubbish once the factors are rounded; and the Gram matrices are singular where the stack needs fewer
terms than there are. So each solve has a ridge relative to its diagonal, as large as what rounding to bfloat16 does.
What the steps minimise, and never let rise, is to first order the error expected after storage:

    sum_i ( ||M_i - U diag(s_i) V^T||^2 + RIDGE sum_k s_ik^2 ||u_k||^2 ||v_k||^2 )

Legend as in stack.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cluster.compression.basis import Basis, unit_diagonals
from cluster.compression.stack import FactorStack
from cluster.compression.svd import dominant_pairs

MAX_ITERATIONS = 100
TOLERANCE = 1e-5  # on the captured energy; alternating least squares creeps where the eigenvalue iteration leaps
# Three roundings of relative variance 2^-16 / 6 or so: u, v and s.
RIDGE = 1e-5
# Float32 products know a diagonal to 1e-7: enough to keep its error from being blown up, too little to be seen.
_CORE_RIDGE = 1e-7


def jd_diag(stack: FactorStack, rank: int, seed: int) -> Basis:
    """The basis on which diagonal cores capture most of the stack's energy: U (d_out, r), V (d_in, r), float32, columns
    of norm 1, not orthogonal.

    r = min(rank, K), where K <= sum_i min(R_i, d_out, d_in) rank-one terms hold the whole stack: from there on it is
    lossless. T and the sides are no tighter bounds on what is worth having. r x r numbers mix d directions to
    anything, r numbers do not, so a module narrower than T gains from r > d; and adapters that repeat each other need
    fewer terms than T, where more would only make the solves singular.
    ``seed`` changes nothing: nothing is drawn, the start is the stack's dominant singular pairs. Of the starts
    tried on real adapters (these; the largest pairs, repeats and all; JD-Full's basis rotated so that the mean core or
    the principal one is diagonal; random columns) they end lowest at every rank, and in the fewest iterations. Optima
    are many all the same: where adapters share exact rank-one terms, another start may find more of them.
    """
    U, V = map(_unit_columns, dominant_pairs(stack, rank))
    num_rows = torch.tensor(stack.ranks, device=U.device)
    P, Q = stack.A @ V, stack.B @ U
    S, captured = _best_cores(U, V, stack.padded(P * Q).sum(1))
    for _ in range(MAX_ITERATIONS):
        weights = S.float().repeat_interleave(num_rows, 0)  # (T, r): every row's s_i
        U = _unit_columns(_solve(_gram(V) * _gram(S), stack.B.T @ (P * weights), RIDGE))
        Q = stack.B @ U
        V = _unit_columns(_solve(_gram(U) * _gram(S), stack.A.T @ (Q * weights), RIDGE))
        P = stack.A @ V
        before = captured
        S, captured = _best_cores(U, V, stack.padded(P * Q).sum(1))
        if captured - before <= TOLERANCE * captured:
            break
    return Basis(U, V)


def diagonal_cores(stack: FactorStack, basis: Basis) -> Tensor:
    """s_i = argmin_s ||M_i / ||M_i|| - U diag(s) V^T||: the best cores (n, r) of the stack's unit-norm adapters,
    float32, on any U, V of equally many columns, also where storage has rounded them, or columns repeat or vanish."""
    return _solve(_gram(basis.U) * _gram(basis.V), unit_diagonals(stack, basis), _CORE_RIDGE).float()


def _best_cores(U: Tensor, V: Tensor, diagonals: Tensor) -> tuple[Tensor, float]:
    """The cores (n, r) that minimise what the iteration minimises, float64, and how much they take off it."""
    S = _solve(_gram(U) * _gram(V), diagonals, RIDGE)
    return S, float((S * diagonals).sum())


def _solve(gram: Tensor, rows: Tensor, ridge: float) -> Tensor:
    """rows (m, r) [gram + ridge diag(gram)]^-1, float64, by Cholesky; 0 in columns where the gram (r, r) is."""
    diagonal = gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0)
    loaded = gram * scale * scale.unsqueeze(1) + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve((rows.double() * scale).T, torch.linalg.cholesky(loaded)).T * scale


def _gram(columns: Tensor) -> Tensor:
    columns = columns.double()
    return columns.T @ columns


def _unit_columns(columns: Tensor) -> Tensor:
    """Float32; a column of zeros stays one: its term has died, and its cores are 0."""
    norms = columns.norm(dim=0)
    return (columns / torch.where(norms > 0, norms, 1)).float()
