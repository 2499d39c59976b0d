"""One module's adapters side by side, in factored form: the d_out x d_in product is never formed.

Legend: n adapters, T = sum of their ranks at this module, R = the largest of them, r = a basis' rank. An adapter's own
factors are M_i = B A, B (d_out, R_i); in a stack they are rows, M_i = B_i^T A_i with B_i (R_i, d_out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from cluster.adapters.factors import Factors, gram_energy


@dataclass(frozen=True)
class FactorStack:
    """Unit-norm adapters M_i / ||M_i||_F = B_i^T A_i of one module, their rows laid end to end.

    Dividing by the norm gives each adapter the weight 1 / ||M_i||^2 at each module, as the paper's authors' code does.
    One weight per adapter over all its modules, 1 / sum_m ||M_im||^2, is the other way, with no clear winner:
    infra/bench/README.md, "Weights of adapters in a basis".
    Mixed ranks cost no padding where d is large: only (n, R, r) intermediates are padded.
    """

    A: Tensor  # (T, d_in) float32
    B: Tensor  # (T, d_out) float32: B transposed, scaled so that B_i^T A_i has norm 1
    ranks: tuple[int, ...]  # n
    gram_A: Tensor  # (n, R, R) float64: A_i A_i^T, zeros beyond the adapter's own rank
    gram_B: Tensor  # (n, R, R) float64: B_i B_i^T
    norms: Tensor  # (n,) float64: ||M_i||_F
    members: tuple[int, ...]  # n: which adapter of the collection each one is

    @property
    def num_adapters(self) -> int:
        return len(self.ranks)

    def to(self, device: torch.device | str) -> FactorStack:
        """The same stack on ``device``; what is computed from it stays there."""
        return replace(
            self,
            A=self.A.to(device),
            B=self.B.to(device),
            gram_A=self.gram_A.to(device),
            gram_B=self.gram_B.to(device),
            norms=self.norms.to(device),
        )

    def padded(self, rows: Tensor) -> Tensor:
        """(T, r) -> (n, R, r), zeros below each adapter's own rows; a view where all have one rank."""
        n, R, r = self.num_adapters, max(self.ranks), rows.shape[1]
        if len(rows) == n * R:
            return rows.view(n, R, r)
        out = rows.new_zeros(n * R, r)
        out[_positions(self.ranks)] = rows
        return out.view(n, R, r)

    def unpadded(self, padded: Tensor) -> Tensor:
        """The inverse of ``padded``: (n, R, r) -> (T, r)."""
        rows = padded.flatten(0, 1)
        return rows if len(rows) == len(self.A) else rows[_positions(self.ranks)]

    def select(self, indices: Sequence[int]) -> FactorStack:
        """The sub-stack of the adapters at positions ``indices`` (0 .. n-1) of this stack."""
        starts = [0]
        for rank in self.ranks:
            starts.append(starts[-1] + rank)
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices])
        ranks = tuple(self.ranks[i] for i in indices)
        R = max(ranks)
        return FactorStack(
            A=self.A[rows],
            B=self.B[rows],
            ranks=ranks,
            gram_A=self.gram_A[list(indices), :R, :R],
            gram_B=self.gram_B[list(indices), :R, :R],
            norms=self.norms[list(indices)],
            members=tuple(self.members[i] for i in indices),
        )


def stack_factors(factors: Sequence[tuple[int, Factors]]) -> FactorStack | None:
    """Stack (member, (A (r, d_in), B (d_out, r))) pairs. Adapters of zero norm are left out, for 1/0 would
    poison the basis of everybody; None when nothing is left."""
    total = sum(A.shape[0] for _, (A, _) in factors)
    if total == 0:
        return None
    _, (first_A, first_B) = factors[0]
    rows_A, rows_B = first_A.new_empty(total, first_A.shape[1]), first_B.new_empty(total, first_B.shape[0])
    ranks, grams_A, grams_B, norms, members = [], [], [], [], []
    T = 0
    for member, (A, B) in factors:
        wide_A, wide_B = A.double(), B.double()
        gram_A, gram_B = wide_A @ wide_A.T, wide_B.T @ wide_B
        norm = gram_energy(gram_A, gram_B) ** 0.5
        if norm == 0:
            continue
        # Balanced factors of norm 1: the product of raw factors could leave float32.
        scale_A = float(gram_A.trace()) ** 0.5
        rank = A.shape[0]
        _scale(A, 1 / scale_A, rows_A[T : T + rank])
        _scale(B.T, scale_A / norm, rows_B[T : T + rank])
        T += rank
        ranks.append(rank)
        grams_A.append(gram_A / scale_A**2)
        grams_B.append(gram_B * (scale_A / norm) ** 2)
        norms.append(norm)
        members.append(member)
    if not members:
        return None
    return FactorStack(
        A=rows_A[:T],
        B=rows_B[:T],
        ranks=tuple(ranks),
        gram_A=_blocks(grams_A),
        gram_B=_blocks(grams_B),
        norms=torch.tensor(norms, dtype=torch.float64),
        members=tuple(members),
    )


def _blocks(grams: Sequence[Tensor]) -> Tensor:
    R = max(len(gram) for gram in grams)
    blocks = torch.zeros(len(grams), R, R, dtype=torch.float64)
    for block, gram in zip(blocks, grams, strict=True):
        block[: len(gram), : len(gram)] = gram
    return blocks


def _scale(rows: Tensor, factor: float, out: Tensor) -> None:
    # In float64 only where float32 has no room for the factor: twice the bytes.
    torch.mul(rows if 1e-30 < factor < 1e30 else rows.double(), factor, out=out)


@lru_cache(maxsize=64)
def _positions(ranks: tuple[int, ...]) -> Tensor:
    """(T,): where each row lies among the padded ones."""
    R = max(ranks)
    return torch.cat([torch.arange(rank) + i * R for i, rank in enumerate(ranks)])
