"""One module's adapters side by side, in factored form: the d_out x d_in product is never formed.

Legend: n adapters, T = sum of their ranks at this module, R = the largest of them, r = a basis' rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adapter import Factors, factored_energy


@dataclass(frozen=True)
class FactorStack:
    """Unit-norm adapters M_i / ||M_i||_F = B_i^T A_i of one module, their rows laid end to end.

    Dividing by the norm gives each adapter the paper's weight 1 / ||M_i||^2 at each module. Kept, for
    want of a clear winner: one weight per adapter over all its modules, 1 / sum_m ||M_im||^2, has the lower mean
    held-out loss at tight ranks (12 shipped adapters, one cluster: 1.039 against 1.179 at rank 2, 0.764 against 0.816
    at 4, 0.627 against 0.640 at 8; 37 of the larger zoo at rank 8: 1.622 against 1.658), but a few adapters make that
    difference: it is the better one for 7, 7 and 6 of 12, and for 15 of 37
    (``python -m infra.normalisation --rows 8``; infra/results/normalisation-*.jsonl).
    Mixed ranks cost no padding where d is large: only (n, R, r) intermediates are padded.
    """

    A: Tensor  # (T, d_in) float32
    B: Tensor  # (T, d_out) float32: B transposed, scaled so that B_i^T A_i has norm 1
    ranks: tuple[int, ...]  # n
    norms: Tensor  # (n,) float64: ||M_i||_F
    members: tuple[int, ...]  # n: which adapter of the collection each one is

    @property
    def num_adapters(self) -> int:
        return len(self.ranks)

    def padded(self, rows: Tensor) -> Tensor:
        """(T, r) -> (n, R, r), zeros below each adapter's own rows."""
        n, R, r = self.num_adapters, max(self.ranks), rows.shape[1]
        out = rows.new_zeros(n * R, r)
        out[self._positions()] = rows
        return out.view(n, R, r)

    def unpadded(self, padded: Tensor) -> Tensor:
        """The inverse of ``padded``: (n, R, r) -> (T, r)."""
        return padded.reshape(-1, padded.shape[2])[self._positions()]

    def select(self, indices: Sequence[int]) -> FactorStack:
        """The sub-stack of the adapters at positions ``indices`` (0 .. n-1) of this stack."""
        starts = [0]
        for rank in self.ranks:
            starts.append(starts[-1] + rank)
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in indices])
        return FactorStack(
            A=self.A[rows],
            B=self.B[rows],
            ranks=tuple(self.ranks[i] for i in indices),
            norms=self.norms[list(indices)],
            members=tuple(self.members[i] for i in indices),
        )

    def _positions(self) -> Tensor:
        R = max(self.ranks)
        return torch.cat([torch.arange(rank) + i * R for i, rank in enumerate(self.ranks)])


def stack_factors(factors: Sequence[tuple[int, Factors]]) -> FactorStack | None:
    """Stack (member, (A (r, d_in), B (d_out, r))) pairs. Adapters of zero norm are left out, for 1/0 would
    poison the basis of everybody; None when nothing is left."""
    rows_A, rows_B, ranks, norms, members = [], [], [], [], []
    for member, (A, B) in factors:
        norm = factored_energy(A, B) ** 0.5
        if norm == 0:
            continue
        # Balanced factors of norm 1: the product of raw factors could leave float32.
        scale_A = float(A.double().norm())
        rows_A.append((A.double() / scale_A).float())
        rows_B.append((B.T.double() * (scale_A / norm)).float())
        ranks.append(A.shape[0])
        norms.append(norm)
        members.append(member)
    if not members:
        return None
    return FactorStack(
        torch.cat(rows_A), torch.cat(rows_B), tuple(ranks), torch.tensor(norms, dtype=torch.float64), tuple(members)
    )
