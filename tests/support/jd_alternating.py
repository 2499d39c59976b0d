"""The alternating form of JD-Full, the paper's main setting: U <- top-r left singular subspace of [M_i V]_i, then
V <- that of [M_i^T U]_i with the new U.

The check of the eigenvalue iteration in jd_full.py, which takes a step towards each of these subspaces where this takes
the subspace itself, by an eigendecomposition of min(d, T)^2 numbers a step. Factored, with P_i = A_i V:
sum_i M_i V V^T M_i^T = sum_i B_i P_i P_i^T B_i^T.

Legend as in stack.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cluster.compression import jd_full as jd
from cluster.compression.basis import Basis
from cluster.compression.stack import FactorStack


def jd_alternating(stack: FactorStack, rank: int, seed: int) -> Basis:
    """As ``jd_full``: same objective, bounds on r_U and r_V, kind of start and rule to stop; other steps."""
    T = sum(stack.ranks)
    r_U, r_V = min(rank, T, stack.B.shape[1]), min(rank, T, stack.A.shape[1])
    # Everything happens in the span of the factors' rows: T directions where T is less than d.
    frame_U, rows_B = torch.linalg.qr(stack.B.T)
    frame_V, rows_A = torch.linalg.qr(stack.A.T)
    inner = replace(stack, A=rows_A.T, B=rows_B.T)
    start = torch.randn(T, r_V, generator=torch.Generator().manual_seed(seed)).to(stack.A.device)
    V = torch.linalg.qr(inner.A.T @ start).Q
    captured = 0.0
    for _ in range(jd.MAX_ITERATIONS):
        U = _top_subspace(inner, inner.B, inner.padded(inner.A @ V), r_U)
        Q = inner.padded(inner.B @ U)
        V = _top_subspace(inner, inner.A, Q, r_V)
        before, captured = captured, float((Q.mT @ inner.padded(inner.A @ V)).double().square().sum())
        if captured - before <= jd.TOLERANCE * captured:
            break
    return Basis(frame_U @ U, frame_V @ V)


def _top_subspace(stack: FactorStack, rows: Tensor, P: Tensor, rank: int) -> Tensor:
    """The top left singular vectors (d, rank) of [rows_i^T P_i]_i, for rows (T, d) and P (n, R, r)."""
    gram = rows.T @ stack.unpadded(P @ (P.mT @ stack.padded(rows)))
    vectors: Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors[:, -rank:].float()
