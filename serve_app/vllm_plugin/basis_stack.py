"""One adapted layer's bases and cores, stacked at fixed addresses, and what they add to the layer's output.

Shapes: T tokens, C basis positions, R the largest rank, n slices of a packed layer (q, k and v of one product: 3;
else 1), S = C x slots_per_cluster + 1 cores, the last of them always zero. Smaller ranks are filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from cluster.layer import ModuleWeights
from serve_app.vllm_plugin.settings import PluginSettings
from serve_app.vllm_plugin.token_index import BasisTokens, Padding, TokenIndex

MAX_SERIAL_TOKENS = 256
"""A decoding step's products take some 50 us each; on several threads each may wait for a core that another process
holds just then. On one thread they cost no more in any run (2 CPUs: e25 of infra/bench_serving at 256 adapters 0.87 of
the requests/s without LoRA, 0.73 before; at 64 as before). Longer steps, which prefill, have products worth sharing."""


class BasisStack:
    """``V`` (C + 1, 1, n R, d_in) holds the slices' V^T on top of each other, so that all of a packed layer's are
    one product; ``U[i]`` (C + 1, 1, d_out_i, R); ``cores`` (S, n, R, R), or (S, n, R) where diagonal. The extra
    position C is always zero: vLLM's CPU kernels take index -1 for the last one.
    """

    def __init__(
        self, settings: PluginSettings, d_in: int, d_outs: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        C, n, R = settings.num_clusters, len(d_outs), settings.rank
        self.settings, self.d_in, self.d_outs, self.num_slices, self.rank = settings, d_in, tuple(d_outs), n, R
        self.V = torch.zeros(C + 1, 1, n * R, d_in, dtype=dtype, device=device)
        self.U = tuple(torch.zeros(C + 1, 1, d_out, R, dtype=dtype, device=device) for d_out in d_outs)
        core_shape = (R,) if settings.is_diagonal else (R, R)
        self._V_T = [self.V[position, 0].T for position in range(C)]
        self._U_T = [[U[position, 0].T for position in range(C)] for U in self.U]
        self.cores = torch.zeros(C * settings.slots_per_cluster + 1, n, *core_shape, dtype=dtype, device=device)

    def put(self, position: int, slices: Sequence[ModuleWeights | None]) -> None:
        """Write a cluster's weights, one entry a slice (None: that slice's module is not touched)."""
        self.clear(position)
        start = position * self.settings.slots_per_cluster
        for i, weights in enumerate(slices):
            if weights is None:
                continue
            assert weights.cores is not None
            r_U, r_V, num_cores = weights.U.shape[1], weights.V.shape[1], weights.cores.shape[0]
            self.V[position, 0, i * self.rank : i * self.rank + r_V].copy_(weights.V.T)
            self.U[i][position, 0, :, :r_U].copy_(weights.U)
            own = self.cores[start : start + num_cores, i]
            (own[:, :r_U] if self.settings.is_diagonal else own[:, :r_U, :r_V]).copy_(weights.cores)

    def clear(self, position: int) -> None:
        start = position * self.settings.slots_per_cluster
        self.V[position].zero_()
        self.cores[start : start + self.settings.slots_per_cluster].zero_()
        for U in self.U:
            U[position].zero_()

    def add_grouped(self, out: Tensor, x: Tensor, tokens: BasisTokens) -> None:
        """Semantics, for each of the tokens t (its position c, its core s) and slice i:

            out_i[t] += U_i[c] S_i[s] V_i[c]^T x[t]

        out (T, sum of d_out_i) is changed in place; x (T, d_in); both of the stack's dtype. A token meets its own basis
        only.
        """
        rows = x if tokens.rows is None else x.index_select(0, tokens.rows)
        if tokens.rows is None:
            position = tokens.positions[0]
            mixed = self._mix(torch.mm(rows, self._V_T[position]), tokens.slots)
            add_slices(out, None, [(mixed[:, i], U[position, 0]) for i, U in enumerate(self.U)])
        elif tokens.padding is None:
            mixed = self._mix(self._shrink_each(rows, tokens), tokens.slots)
            out.index_add_(0, tokens.rows, self._expand_each(mixed, tokens))
        else:
            mixed = self._mix(self._shrink_padded(rows, tokens.padding), tokens.slots)
            out.index_add_(0, tokens.rows, self._expand_padded(mixed, tokens.padding))

    def _shrink_each(self, rows: Tensor, tokens: BasisTokens) -> Tensor:
        h = rows.new_empty(len(rows), self.num_slices * self.rank)
        parts = zip(
            tokens.positions, rows.split_with_sizes(tokens.sizes), h.split_with_sizes(tokens.sizes), strict=True
        )
        for position, own, target in parts:
            torch.mm(own, self._V_T[position], out=target)
        return h

    def _expand_each(self, mixed: Tensor, tokens: BasisTokens) -> Tensor:
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

    # With 32 tokens on 25 bases each product has one or two rows, and what counts is how few calls there are: one for
    # all bases, each with as many rows as the fullest has, zeros where it has fewer tokens.

    def _shrink_padded(self, rows: Tensor, padding: Padding) -> Tensor:
        C, width = self.settings.num_clusters, padding.width
        padded = rows.new_zeros(C * width, self.d_in).index_copy_(0, padding.places, rows).view(C, width, -1)
        return torch.bmm(padded, self.V[:C, 0].transpose(1, 2)).flatten(0, 1).index_select(0, padding.places)

    def _expand_padded(self, mixed: Tensor, padding: Padding) -> Tensor:
        C, width = self.settings.num_clusters, padding.width
        padded = mixed.new_zeros(C * width, self.num_slices, self.rank).index_copy_(0, padding.places, mixed)
        parts = padded.view(C, width, self.num_slices, self.rank).unbind(2)
        deltas = [torch.bmm(part, U[:C, 0].transpose(1, 2)) for part, U in zip(parts, self.U, strict=True)]
        return torch.cat([delta.flatten(0, 1).index_select(0, padding.places) for delta in deltas], dim=1)

    def add_static(self, out: Tensor, x: Tensor, core_slots: Tensor, kernels: Any) -> None:
        """The same for all tokens at once, by their core (T,), without a look at the batch's content. With several
        bases vLLM's own shrink and expand kernels pick each token's, by the metadata in ``kernels``."""
        if self.settings.num_clusters == 1:
            mixed = self._mix(linear(x, self.V[0, 0]), core_slots)
            add_slices(out, None, [(mixed[:, i], self.U[i][0, 0]) for i in range(self.num_slices)])
            return
        shrunk = torch.zeros(1, x.shape[0], self.num_slices * self.rank, dtype=torch.float32, device=x.device)
        kernels.add_shrink(shrunk, x, (self.V,), 1.0)
        mixed = self._mix(shrunk[0].to(x.dtype), core_slots)
        kernels.add_expand(out, mixed.transpose(0, 1).float().contiguous(), self.U, self.d_outs, add_inputs=True)

    def add_triton(self, out: Tensor, x: Tensor, index: TokenIndex) -> None:
        """The same by this project's kernels."""
        from serve_app.vllm_plugin.kernel import add_sorted  # there is no Triton beside torch's CPU build

        add_sorted(out, x, self.V, self.U, self.cores, index.order, index.starts, index.core_slots)

    def _mix(self, h: Tensor, slots: Tensor) -> Tensor:
        """(T, n R) through the cores of ``slots`` (T,): (T, n, R)."""
        h = h.view(-1, self.num_slices, self.rank)
        cores = self.cores.index_select(0, slots)
        if self.settings.is_diagonal:
            return h * cores
        return torch.matmul(cores, h.unsqueeze(-1)).squeeze(-1)


@contextmanager
def threads_for(num_tokens: int) -> Iterator[None]:
    """Inside, torch computes on one thread where the step has at most MAX_SERIAL_TOKENS."""
    usual = torch.get_num_threads()
    if num_tokens > MAX_SERIAL_TOKENS or usual == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def add_slices(out: Tensor, rows: Tensor | None, slices: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Semantics: out[rows, columns of slice i] += h_i U_i^T for each (h_i (T_g, R), U_i (d_out_i, R)); ``rows``
    None means all. out is changed in place."""
    start = 0
    for h, U in slices:
        columns = out[:, start : start + U.shape[0]]
        if rows is None:
            columns.addmm_(h, U.T)
        else:
            columns.index_add_(0, rows, linear(h, U))
        start += U.shape[0]
