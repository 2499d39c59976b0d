"""Per-adapter truncated SVD: the grade below a shared basis, and the baseline beside every joint figure.

Legend as in stack.py; M = B A with A (R, d_in), B (d_out, R).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cluster.adapters.factors import Factors
from cluster.compression.stack import FactorStack, stack_factors

# Of a unit-norm adapter's energy: what float32 products leave uncertain, and more.
_NEGLIGIBLE = 1e-6


def svd_factors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of M = B A, never formed: (U (d_out, p), s (p,) descending, V (d_in, p)), float64,
    p = min(R, d_out, d_in)."""
    Q_B, R_B = torch.linalg.qr(B.double())
    Q_A, R_A = torch.linalg.qr(A.double().T)
    left, s, right_t = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    return Q_B @ left, s, Q_A @ right_t.T


def truncate(A: Tensor, B: Tensor, rank: int) -> Factors:
    """The best factors of at most ``rank`` in Frobenius norm: A (q, d_in), B (d_out, q), float32."""
    U, s, V = svd_factors(A, B)
    q = min(rank, len(s))
    root = s[:q].sqrt()
    return (V[:, :q] * root).T.float().contiguous(), (U[:, :q] * root).float()


def spectra(stack: FactorStack) -> list[np.ndarray]:
    """Squared singular values of each adapter's M_i, descending, float64, R_i of them.

    By eigenvalues of L^T (A A^T) L with B B^T = L L^T: R x R matrices only, batched.
    """
    values, vectors = torch.linalg.eigh(stack.gram_B)
    L = vectors * values.clamp_min(0).sqrt().unsqueeze(1)
    energies = torch.linalg.eigvalsh(L.mT @ stack.gram_A @ L).clamp_min(0).flip(1) * stack.norms.square().unsqueeze(1)
    return [energies[i, :rank].cpu().numpy() for i, rank in enumerate(stack.ranks)]


def adapter_spectra(factors: Mapping[str, Factors]) -> dict[str, list[float]]:
    """Module -> squared singular values of B A, descending; modules of zero norm are left out."""
    stacks = {module: stack_factors([(0, pair)]) for module, pair in factors.items()}
    return {module: spectra(stack)[0].tolist() for module, stack in stacks.items() if stack is not None}


def dominant_pairs(stack: FactorStack, rank: int) -> tuple[Tensor, Tensor]:
    """Singular pairs of single adapters, as columns u of U (d_out, q) and v of V (d_in, q), q <= rank, float32: each
    time the pair of which most is left once the pairs already taken are projected out, until nothing is left.

    A pivoted Cholesky factorisation of the Gram matrix of all sigma u v^T, of which only the pivots' columns are
    formed. u has norm 1, v its singular value. q < rank only where the q pairs hold the whole stack.
    """
    mix_B, mix_A, energies = _singular_mixes(stack)
    left = energies.clamp_min(0).flatten()  # of each pair's energy, what the pairs taken do not hold
    taken = left.new_zeros(len(left), rank)
    starts = [0, *itertools.accumulate(stack.ranks)]
    pairs = []
    for k in range(rank):
        pivot = int(left.argmax())
        if float(left[pivot]) <= _NEGLIGIBLE:
            break
        i, j = divmod(pivot, energies.shape[1])
        own = slice(starts[i], starts[i + 1])
        u = stack.B[own].T @ mix_B[i, : stack.ranks[i], j : j + 1]
        v = stack.A[own].T @ mix_A[i, : stack.ranks[i], j : j + 1]
        pairs.append((u, v))
        inner = (mix_B.mT @ stack.padded(stack.B @ u)) * (mix_A.mT @ stack.padded(stack.A @ v))
        taken[:, k] = (inner.double().flatten() - taken[:, :k] @ taken[pivot, :k]) / left[pivot].sqrt()
        left = (left - taken[:, k].square()).clamp_min(0)
        left[pivot] = 0
    return torch.cat([u for u, _ in pairs], 1), torch.cat([v for _, v in pairs], 1)


def truncate_all(stack: FactorStack, rank: int) -> FactorStack:
    """Each adapter cut to its ``rank`` largest singular values (or all of them), M_i ~ sum_k u_k (sigma_k v_k)^T: rows
    u_k of B and sigma_k v_k of A. It keeps the norm of the whole one, as its weight."""
    mix_B, mix_A, energies = _singular_mixes(stack)
    starts = [0, *itertools.accumulate(stack.ranks)]
    ranks = tuple(min(rank, own) for own in stack.ranks)
    A, B = stack.A.new_empty(sum(ranks), stack.A.shape[1]), stack.B.new_empty(sum(ranks), stack.B.shape[1])
    gram_A, gram_B = energies.new_zeros(2, len(ranks), max(ranks), max(ranks))
    end = 0
    for i, (own, kept) in enumerate(zip(stack.ranks, ranks, strict=True)):
        rows, end = slice(starts[i], starts[i + 1]), end + kept
        torch.mm(mix_A[i, :own, -kept:].T, stack.A[rows], out=A[end - kept : end])
        torch.mm(mix_B[i, :own, -kept:].T, stack.B[rows], out=B[end - kept : end])
        gram_A[i, :kept, :kept] = energies[i, -kept:].diag()
        gram_B[i, :kept, :kept] = torch.eye(kept)
    return replace(stack, A=A, B=B, ranks=ranks, gram_A=gram_A, gram_B=gram_B)


def smallest_rank(module_spectra: Sequence[np.ndarray], gate: float) -> tuple[int, float]:
    """The smallest q for which cutting every module to rank q leaves an error <= ``gate``; and that error.

    ``module_spectra``: squared singular values by module. q is at most the largest rank (error 0).
    """
    total = sum(float(spectrum.sum()) for spectrum in module_spectra)
    largest = max(len(spectrum) for spectrum in module_spectra)
    for q in range(1, largest):
        error = sum(float(spectrum[q:].sum()) for spectrum in module_spectra) / total
        if error <= gate:
            return q, error
    return largest, 0.0


def errors_at_equal_bytes(
    adapters: Mapping[str, Mapping[str, np.ndarray]], component_bytes: Mapping[str, int], budget_bytes: int
) -> dict[str, float]:
    """Error of each adapter when plain SVD may spend ``budget_bytes`` on all of them together.

    ``adapters``: id -> module -> squared singular values; ``component_bytes``: module -> bytes of one
    singular component there. The budget is spent component by component where a byte lowers the mean error
    most, in ranks that may differ by adapter and module: the best that truncation can do for the mean, so
    that the joint figure beside it is not flattered.
    """
    kept = components_at_equal_bytes(adapters, component_bytes, budget_bytes)
    errors = {}
    for adapter_id, modules in adapters.items():
        total = sum(float(spectrum.sum()) for spectrum in modules.values())
        lost = sum(float(spectrum[kept[adapter_id, module] :].sum()) for module, spectrum in modules.items())
        errors[adapter_id] = lost / total
    return errors


def components_at_equal_bytes(
    adapters: Mapping[str, Mapping[str, np.ndarray]], component_bytes: Mapping[str, int], budget_bytes: int
) -> dict[tuple[str, str], int]:
    """(id, module) -> how many singular components the budget of ``errors_at_equal_bytes`` keeps."""
    owners, gains, costs = [], [], []
    for adapter_id, modules in adapters.items():
        total = sum(float(spectrum.sum()) for spectrum in modules.values())
        for module, spectrum in modules.items():
            owners += [(adapter_id, module)] * len(spectrum)
            gains.append(spectrum / total / component_bytes[module])
            costs.append(np.full(len(spectrum), component_bytes[module]))
    # Stable: of equal gains (a spectrum's zeros) the earlier component comes first, so each owner keeps a prefix.
    order = np.argsort(-np.concatenate(gains), kind="stable")
    affordable = order[np.cumsum(np.concatenate(costs)[order]) <= budget_bytes]
    kept = dict.fromkeys(owners, 0)
    for index in affordable:
        kept[owners[index]] += 1
    return kept


def _singular_mixes(stack: FactorStack) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (n, R, R) of each adapter's rows of B and of A, a singular pair a column: u = B_i^T b of norm 1 and
    sigma v = A_i^T a, float32; and sigma^2 (n, R), float64, ascending, zeros first where R_i < R."""
    # M_i = B_i^T A_i. With B_i B_i^T = X D^2 X^T: M_i = (B_i^T X D^-1) (D X^T A_i), the first factor orthonormal, so
    # D X^T A_i A_i^T X D = Y diag(sigma^2) Y^T gives u = B_i^T X D^-1 y and sigma v = A_i^T X D y.
    squares, X = torch.linalg.eigh(stack.gram_B)
    D = squares.clamp_min(0).sqrt().unsqueeze(1)
    inverse = torch.where(D / D.amax(2, keepdim=True) > 1e-7, 1 / D, 0)
    energies, Y = torch.linalg.eigh((X * D).mT @ stack.gram_A @ (X * D))
    return ((X * inverse) @ Y).float(), ((X * D) @ Y).float(), energies
