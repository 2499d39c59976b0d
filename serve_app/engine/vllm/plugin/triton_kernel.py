"""Triton kernels for shrink, core and expand on a step's tokens, for GPUs.

    h[t] = V[c]^T x[t]      mixed_i[t] = S_i[s] h_i[t]      out_i[t] += U_i[c] mixed_i[t]

with t's basis c and core s. Two launches, always of the same shape for a step of T tokens, whatever is in it: a
captured graph replays them on any batch. A program has one basis and a block of the tokens that are on it, so that a
basis is read once a block and a token meets no other; programs beyond a basis's tokens end at once. Sums are in
float32. After Punica's SGMV (arXiv 2310.18547), with the core between its two halves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, library

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# An operator of torch's own, for torch.compile must not look inside: it would freeze what is chosen by the number of
# tokens, and vLLM drops the guards that would notice.
@library.custom_op("compress_then_serve::add_sorted", mutates_args=("out",))
def add_sorted(
    out: Tensor, x: Tensor, V: Tensor, U: Sequence[Tensor], cores: Tensor, order: Tensor, starts: Tensor, slots: Tensor
) -> None:
    """Semantics: the three lines above, for every token on a basis and every slice i.

    out (T, sum of d_out_i) is changed in place; x (T, d_in); V (C', 1, n R, d_in) and U[i] (C', 1, d_out_i, R) with
    C' >= C; cores (S, n, R, R), or (S, n, R) where diagonal; all of one dtype, contiguous but for the rows of out and
    x. ``order``, ``starts``, ``slots`` as TokenIndex has them (its core_slots). Sums in float32.
    """
    # Triton's interpreter multiplies the bits of bfloat16 as if they were integers (triton issue 11584).
    dot = tl.float32 if triton.knobs.runtime.interpret else _DTYPES[x.dtype]
    num_tokens, num_bases, n, R = len(x), len(starts) - 1, len(U), U[0].shape[-1]
    mixed = torch.empty(num_tokens, n, R, dtype=torch.float32, device=x.device)
    block_tokens, block_rank = 16 if num_tokens <= 256 else 64, max(16, triton.next_power_of_2(R))
    blocks = triton.cdiv(num_tokens, block_tokens)
    _shrink_mix[(num_bases, blocks, n)](
        x, V, cores, mixed, order, starts, slots,
        x.stride(0), x.shape[1],
        N=n, R=R, IS_DIAGONAL=cores.dim() == 3, DOT=dot,
        BLOCK_T=block_tokens, BLOCK_K=128 if block_rank <= 64 else 64, BLOCK_R=block_rank,
    )  # fmt: skip
    block_out = 128 if block_rank <= 64 else 64
    widths = [triton.cdiv(own.shape[2], block_out) for own in U]
    # The same pointer again where a layer has fewer slices: three is the most that vLLM packs.
    padded = [*U, *[U[0]] * (3 - n)]
    sizes = [own.shape[2] for own in U] + [0] * (3 - n)
    _expand[(num_bases, blocks, sum(widths))](
        mixed, *padded, out, order, starts,
        out.stride(0), *sizes, widths[0], sum(widths[:2]),
        N=n, R=R, DOT=dot, BLOCK_T=block_tokens, BLOCK_O=block_out, BLOCK_R=block_rank,
    )  # fmt: skip


@triton.jit
def _shrink_mix(
    x, V, cores, mixed, order, starts, slots, x_stride, d_in,
    N: tl.constexpr, R: tl.constexpr, IS_DIAGONAL: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    basis, block, i = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.load(starts + basis) + block * BLOCK_T + tl.arange(0, BLOCK_T)
    end = tl.load(starts + basis + 1)
    if tl.load(starts + basis) + block * BLOCK_T >= end:
        return
    is_own = place < end
    rows = tl.load(order + place, mask=is_own, other=0).to(tl.int64)
    r, k = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    own_V = V + (basis.to(tl.int64) * N + i) * R * d_in
    h = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        columns = start + k
        x_block = tl.load(
            x + rows[:, None] * x_stride + columns[None, :],
            mask=is_own[:, None] & (columns < d_in)[None, :], other=0.0,
        )  # fmt: skip
        V_block = tl.load(
            own_V + r[None, :] * d_in + columns[:, None],
            mask=(r < R)[None, :] & (columns < d_in)[:, None], other=0.0,
        )  # fmt: skip
        h += tl.dot(x_block.to(DOT), V_block.to(DOT), input_precision="ieee")
    slot = tl.load(slots + rows, mask=is_own, other=0)
    if IS_DIAGONAL:
        core = tl.load(
            cores + (slot[:, None] * N + i) * R + r[None, :], mask=is_own[:, None] & (r < R)[None, :], other=0.0
        )
        result = h * core.to(tl.float32)
    else:
        # Each token has a core of its own: no matrix product of the block, but a row of every core at a time.
        result = tl.zeros((BLOCK_T, BLOCK_R), dtype=tl.float32)
        own_core = cores + (slot * N + i) * R * R
        for j in range(R):
            row = tl.load(
                own_core[:, None] + j * R + r[None, :], mask=is_own[:, None] & (r < R)[None, :], other=0.0
            ).to(tl.float32)
            result = tl.where((r == j)[None, :], tl.sum(row * h, axis=1)[:, None], result)
    tl.store(mixed + (rows[:, None] * N + i) * R + r[None, :], result, mask=is_own[:, None] & (r < R)[None, :])


@triton.jit
def _expand(
    mixed, U0, U1, U2, out, order, starts, out_stride, size0, size1, size2, end0, end1,
    N: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    basis, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if tl.load(starts + basis) + block * BLOCK_T >= tl.load(starts + basis + 1):
        return
    if part < end0:
        _expand_slice(mixed, U0, out, order, starts, out_stride, size0, 0, basis, block, part, 0,
                      N, R, DOT, BLOCK_T, BLOCK_O, BLOCK_R)  # fmt: skip
    elif part < end1:
        _expand_slice(mixed, U1, out, order, starts, out_stride, size1, size0, basis, block, part - end0, 1,
                      N, R, DOT, BLOCK_T, BLOCK_O, BLOCK_R)  # fmt: skip
    else:
        _expand_slice(mixed, U2, out, order, starts, out_stride, size2, size0 + size1, basis, block, part - end1, 2,
                      N, R, DOT, BLOCK_T, BLOCK_O, BLOCK_R)  # fmt: skip


@triton.jit
def _expand_slice(
    mixed, U, out, order, starts, out_stride, size, first_column, basis, block, part, i,
    N: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    place = tl.load(starts + basis) + block * BLOCK_T + tl.arange(0, BLOCK_T)
    is_own = place < tl.load(starts + basis + 1)
    rows = tl.load(order + place, mask=is_own, other=0).to(tl.int64)
    r, o = tl.arange(0, BLOCK_R), part * BLOCK_O + tl.arange(0, BLOCK_O)
    U_block = tl.load(
        U + basis.to(tl.int64) * size * R + o[None, :] * R + r[:, None],
        mask=(o < size)[None, :] & (r < R)[:, None], other=0.0,
    )  # fmt: skip
    own = tl.load(mixed + (rows[:, None] * N + i) * R + r[None, :], mask=is_own[:, None] & (r < R)[None, :], other=0.0)
    delta = tl.dot(own.to(DOT), U_block.to(DOT), input_precision="ieee")
    target = out + rows[:, None] * out_stride + first_column + o[None, :]
    mask = is_own[:, None] & (o < size)[None, :]
    tl.store(target, (tl.load(target, mask=mask, other=0.0).to(tl.float32) + delta).to(out.dtype.element_ty), mask=mask)
