"""Clustering of many adapters: each by its few largest singular values, which tell who belongs together.

What is kept of an adapter is small, so the clustering goes by groups of clusters and chunks of adapters, none of which
grows with the collection: ``compress_jobs/job/cluster_many.py`` hands these functions to tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from cluster.compression.balanced import Labels
from cluster.compression.basis import Basis, captured_energy
from cluster.compression.jd_full import jd_full
from cluster.compression.stack import FactorStack
from cluster.compression.svd import truncate_all

FEWEST = 2  # singular values of an adapter. With one alone the rounds raised the error, where it was tried


@dataclass(frozen=True)
class Leading:
    """One module of some adapters, M_i / ||M_i|| ~ sum_j b_j a_j^T. ``members`` (n,) int64, ascending; ``A``
    (n, q, d_in), ``B`` (n, q, d_out) float16, zeros beyond an adapter's rank; ``weights`` (n,) float64: what the module
    stands for in each one's error."""

    members: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor

    FIELDS: ClassVar[tuple[str, ...]] = ("members", "A", "B", "weights")

    @staticmethod
    def of(stack: FactorStack, member: int, weight: NDArray[np.float64], rank: int) -> Leading:
        """The ``rank`` largest singular values of the one adapter in the stack. ``weight`` (1,)."""
        cut = truncate_all(stack, rank)
        A, B = (pad(rows, (0, 0, 0, rank - len(rows))).half()[None] for rows in (cut.A, cut.B))
        return Leading(torch.tensor([member]), A, B, torch.from_numpy(weight.copy()))

    @staticmethod
    def joined(parts: Sequence[Leading]) -> Leading:
        """Of other adapters each, in order."""
        return Leading(*(torch.cat([getattr(part, field) for part in parts]) for field in Leading.FIELDS))

    def select(self, adapters: NDArray[np.bool_]) -> Leading:
        """Those of its members that ``adapters`` (N,) holds true for."""
        kept = torch.from_numpy(adapters)[self.members]
        return Leading(self.members[kept], self.A[kept], self.B[kept], self.weights[kept])

    def stack(self) -> FactorStack:
        n, q, _ = self.A.shape
        A, B = self.A.float(), self.B.float()
        gram_A, gram_B = (rows.double() @ rows.double().mT for rows in (A, B))
        members = tuple(self.members.tolist())
        return FactorStack(A.flatten(0, 1), B.flatten(0, 1), (q,) * n, gram_A, gram_B, torch.ones(n).double(), members)


def values_needed(num_adapters: int, num_clusters: int, rank: int) -> int:
    """Singular values of each adapter: so many that half a cluster has twice as many rows as its basis has columns."""
    return max(FEWEST, -(-4 * rank * num_clusters // num_adapters))


def fit_leading(leading: Leading, rank: int, seed: int) -> Basis:
    """``jd_full``, in coordinates of what the rows span: the same optimum by steps that do not grow with d."""
    stack = leading.stack()
    own_A, own_B = _span(stack.A), _span(stack.B)
    inner = FactorStack(
        stack.A @ own_A, stack.B @ own_B, stack.ranks, stack.gram_A, stack.gram_B, stack.norms, stack.members
    )
    basis = jd_full(inner, rank, seed)
    return Basis(own_B @ basis.U, own_A @ basis.V)


def add_captured(gains: NDArray[np.float64], leading: Leading, bases: Mapping[int, Basis]) -> None:
    """To ``gains`` (N, k): the share of each member's energy over all modules that each cluster's basis captures at
    this one. ``bases``: cluster -> basis,"""
    if not len(leading.members):
        return
    stack = leading.stack()
    for cluster, basis in bases.items():
        captured = captured_energy(stack, basis) * leading.weights
        gains[leading.members.numpy(), cluster] += captured.numpy()


def halves_of(labels: Labels, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(N,): a random half of every cluster, so that either half has somebody left to fit a basis for the other."""
    halves = np.empty(len(labels), dtype=np.bool_)
    halves[np.argsort(labels + rng.random(len(labels)))] = np.arange(len(labels)) % 2
    return halves


def _span(rows: Tensor) -> Tensor:
    """Orthonormal columns (d, min(T, d)) whose span holds the rows (T, d)."""
    span: Tensor = torch.linalg.qr(rows.T).Q
    return span
