"""One adapted layer's bases and cores, stacked at fixed addresses, and what they add to the layer's output.

Shapes: T tokens, C basis positions, R the largest rank, n slices of a packed layer (q, k and v of one product: 3;
else 1), S = C x slots_per_cluster + 1 cores, the last of them always zero. Smaller ranks are filled up with zeros.
Truncated and raw adapters are in stacks of their own, a position each, without cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from cluster.layer import ModuleWeights
from serve_app.engine.vllm.plugin.settings import PluginSettings
from serve_app.engine.vllm.plugin.token_index import Groups, SortedTokens, Tasks, TokenIndex


class BasisStack:
    """``V`` (C + 1, 1, n R, d_in) holds the slices' V^T on top of each other, so that all of a packed layer's are
    one product; ``U[i]`` (C + 1, 1, d_out_i, R); ``cores`` (S, n, R, R), or (S, n, R) where diagonal. The extra
    position C is always zero: vLLM's CPU kernels take index -1 for the last one. All are written in place, and stay
    where they are. Without ``has_cores`` the one core is the identity, and is multiplied where that costs nothing.
    """

    def __init__(
        self,
        settings: PluginSettings,
        d_in: int,
        d_outs: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        has_cores: bool = True,
    ) -> None:
        C, n, R = settings.num_clusters, len(d_outs), settings.rank
        if settings.products == "numba":
            from serve_app.engine.vllm.plugin.cpu_kernel import UNROLLED, add_tasks  # Numba comes with vLLM

            R = -(-R // UNROLLED) * UNROLLED
        self.settings, self.d_in, self.d_outs, self.num_slices, self.rank = settings, d_in, tuple(d_outs), n, R
        self.has_cores = has_cores
        self.V = torch.zeros(C + 1, 1, n * R, d_in, dtype=dtype, device=device)
        core_shape = (R,) if settings.is_diagonal else (R, R)
        num_cores = C * settings.slots_per_cluster if has_cores else 1
        self.cores = torch.zeros(num_cores + 1, n, *core_shape, dtype=dtype, device=device)
        if not has_cores:
            self.cores[0] = torch.ones(R) if settings.is_diagonal else torch.eye(R)
        if settings.products == "numba":
            # The slices' U^T side by side: the kernel runs along the output's columns.
            U_T = torch.zeros(C + 1, R, sum(d_outs), dtype=dtype, device=device)
            self.U = tuple(part.transpose(1, 2).unsqueeze(1) for part in U_T.split_with_sizes(self.d_outs, dim=2))
            ends = np.cumsum([0, *d_outs])
            self._arrays, self._add_tasks = (self.V.numpy(), U_T.numpy(), ends, self.cores.numpy()), add_tasks
            # Without a token: compiled now, seconds once a process, and not under the first request.
            self._add_numba(self.V.new_zeros(0, sum(d_outs)), self.V.new_zeros(0, d_in), Tasks.none())
        else:
            self.U = tuple(torch.zeros(C + 1, 1, d_out, R, dtype=dtype, device=device) for d_out in d_outs)
        if settings.products == "grouped":
            self._V_T = [self.V[position, 0].T for position in range(C)]
            self._U_T = [[U[position, 0].T for position in range(C)] for U in self.U]

    def put_basis(self, position: int, slices: Sequence[ModuleWeights | None]) -> None:
        """Write a cluster's U and V, one entry a slice (None: that slice's module is not touched)."""
        self.clear([position])
        for i, weights in enumerate(slices):
            if weights is not None:
                self.V[position, 0, i * self.rank : i * self.rank + weights.V.shape[1]].copy_(weights.V.T)
                self.U[i][position, 0, :, : weights.U.shape[1]].copy_(weights.U)

    def has_basis(self, position: int, slices: Sequence[ModuleWeights | None]) -> bool:
        """Whether ``put_basis`` would change nothing."""
        for i, weights in enumerate(slices):
            V, U = self.V[position, 0, i * self.rank : (i + 1) * self.rank], self.U[i][position, 0]
            r_U, r_V = (0, 0) if weights is None else (weights.U.shape[1], weights.V.shape[1])
            if V[r_V:].any() or U[:, r_U:].any():
                return False
            if weights is not None and not (
                torch.equal(V[:r_V], weights.V.T.to(V)) and torch.equal(U[:, :r_U], weights.U.to(U))
            ):
                return False
        return True

    def put_cores(self, position: int, places: Mapping[int, int], slices: Sequence[ModuleWeights | None]) -> None:
        """Write a cluster's cores: that of its slot s to ``places[s]`` of its position's."""
        self.clear_cores(position, list(places.values()))
        slots, to = torch.tensor(list(places), dtype=torch.int64), self._cores_of(position, list(places.values()))
        for i, weights in enumerate(slices):
            if weights is None:
                continue
            assert weights.cores is not None
            own, r_U, r_V = weights.cores.index_select(0, slots), weights.U.shape[1], weights.V.shape[1]
            target = self.cores[:, i, :r_U] if self.settings.is_diagonal else self.cores[:, i, :r_U, :r_V]
            target.index_copy_(0, to, own.to(self.cores))

    def clear_cores(self, position: int, places: Sequence[int]) -> None:
        self.cores.index_fill_(0, self._cores_of(position, places), 0)

    def _cores_of(self, position: int, places: Sequence[int]) -> Tensor:
        own = torch.tensor(places, dtype=torch.int64, device=self.cores.device)
        return position * self.settings.slots_per_cluster + own

    def put_factors(self, positions: Mapping[int, int], slices: Sequence[ModuleWeights | None]) -> None:
        """Write truncated and raw adapters: their home's slot s to ``positions[s]``."""
        self.clear(list(positions.values()))
        slots = torch.tensor(list(positions), dtype=torch.int64)
        places = torch.tensor(list(positions.values()), dtype=torch.int64, device=self.V.device)
        for i, weights in enumerate(slices):
            if weights is None:
                continue
            assert weights.rows is not None
            r, rows = weights.U.shape[2], weights.rows[slots]
            A, B = weights.V.mT.index_select(0, rows), weights.U.index_select(0, rows)
            self.V[:, 0, i * self.rank : i * self.rank + r].index_copy_(0, places, A.to(self.V))
            self.U[i][:, 0, :, :r].index_copy_(0, places, B.to(self.V))

    def clear(self, positions: Sequence[int]) -> None:
        """The bases, or factors, at these positions."""
        places = torch.tensor(positions, dtype=torch.int64, device=self.V.device)
        for tensor in (self.V, *self.U):
            tensor.index_fill_(0, places, 0)

    def add_sorted(self, out: Tensor, x: Tensor, tokens: SortedTokens) -> None:
        """Semantics, for each of the tokens t (its position c, its core s) and slice i:

            out_i[t] += U_i[c] S_i[s] V_i[c]^T x[t]

        out (T, sum of d_out_i) is changed in place; x (T, d_in); both of the stack's dtype. A token meets its own basis
        only.
        """
        if isinstance(tokens, Tasks):
            self._add_numba(out, x, tokens)
        else:
            self._add_grouped(out, x, tokens)

    def _add_grouped(self, out: Tensor, x: Tensor, tokens: Groups) -> None:
        if tokens.rows is None:
            position = tokens.positions[0]
            mixed = self._mix(torch.mm(x, self._V_T[position]), tokens.slots)
            add_slices(out, [(mixed[:, i], U[position, 0]) for i, U in enumerate(self.U)])
        else:
            mixed = self._mix(self._shrink_each(x.index_select(0, tokens.rows), tokens), tokens.slots)
            out.index_add_(0, tokens.rows, self._expand_each(mixed, tokens))

    def _shrink_each(self, rows: Tensor, tokens: Groups) -> Tensor:
        h = rows.new_empty(len(rows), self.num_slices * self.rank)
        parts = zip(
            tokens.positions, rows.split_with_sizes(tokens.sizes), h.split_with_sizes(tokens.sizes), strict=True
        )
        for position, own, target in parts:
            torch.mm(own, self._V_T[position], out=target)
        return h

    def _expand_each(self, mixed: Tensor, tokens: Groups) -> Tensor:
        delta = mixed.new_empty(len(mixed), sum(self.d_outs))
        for i, columns in enumerate(delta.split_with_sizes(self.d_outs, dim=1)):
            parts = zip(
                tokens.positions,
                mixed[:, i].split_with_sizes(tokens.sizes),
                columns.split_with_sizes(tokens.sizes),
                strict=True,
            )
            for position, own, target in parts:
                torch.mm(own, self._U_T[i][position], out=target)
        return delta

    def _add_numba(self, out: Tensor, x: Tensor, tasks: Tasks) -> None:
        if len(x) < tasks.num_tokens:  # the kernel looks at no bounds
            raise IndexError(f"{len(x)} tokens came with the index of a step of {tasks.num_tokens}")
        V, U_T, ends, cores = self._arrays
        self._add_tasks(
            out.numpy(), x.contiguous().numpy(), V, U_T, ends, cores, tasks.positions, tasks.starts, tasks.rows,
            tasks.slots,
        )  # fmt: skip

    def add_static(self, out: Tensor, x: Tensor, core_slots: Tensor, kernels: Any) -> None:
        """The same for all tokens at once, by their core (T,), without a look at the batch's content. With several
        bases vLLM's own shrink and expand kernels pick each token's, by the metadata in ``kernels``."""
        if self.settings.num_clusters == 1 and self.has_cores:
            mixed = self._mix(linear(x, self.V[0, 0]), core_slots)
            add_slices(out, [(mixed[:, i], self.U[i][0, 0]) for i in range(self.num_slices)])
            return
        shrunk = torch.zeros(1, x.shape[0], self.num_slices * self.rank, dtype=torch.float32, device=x.device)
        kernels.add_shrink(shrunk, x, (self.V,), 1.0)
        mixed = self._mix(shrunk[0].to(x.dtype), core_slots)
        kernels.add_expand(out, mixed.transpose(0, 1).float().contiguous(), self.U, self.d_outs, add_inputs=True)

    def add_triton(self, out: Tensor, x: Tensor, index: TokenIndex) -> None:
        """The same by this project's kernels."""
        from serve_app.engine.vllm.plugin.triton_kernel import add_sorted  # there is no Triton beside torch's CPU build

        add_sorted(out, x, self.V, self.U, self.cores, index.order, index.starts, index.core_slots)

    def _mix(self, h: Tensor, slots: Tensor) -> Tensor:
        """(T, n R) through the cores of ``slots`` (T,): (T, n, R)."""
        h = h.view(-1, self.num_slices, self.rank)
        if not self.has_cores:
            return h
        cores = self.cores.index_select(0, slots)
        if self.settings.is_diagonal:
            return h * cores
        return torch.matmul(cores, h.unsqueeze(-1)).squeeze(-1)


def add_slices(out: Tensor, slices: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Semantics: out[:, columns of slice i] += h_i U_i^T for each (h_i (T, R), U_i (d_out_i, R)); out is changed in
    place."""
    start = 0
    for h, U in slices:
        out[:, start : start + U.shape[0]].addmm_(h, U.T)
        start += U.shape[0]
