"""Shrink, core and expand on a step's tokens, compiled for this CPU by Numba (which vLLM brings along).

    h[t] = V[c]^T x[t]      m_i[t] = S_i[s] h_i[t]      out_i[t] += U_i[c] m_i[t]

with t's basis c and core s. A decoding step has one or two tokens on each of many bases: products so small that torch's
calls cost more than what they compute. Here a step is one call a layer, in float32. ``infra.bench.layer`` has both.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

# The threads that torch's products run on (vLLM preloads torch's libgomp, which serves both), and as many: threads of
# Numba's own would fight them for the same CPUs, and another number here would become torch's too.
numba.config.THREADING_LAYER = "omp"
numba.config.NUMBA_NUM_THREADS = torch.get_num_threads()

UNROLLED = 4
"""Rows of V, and ranks of U, that are read for each pass over a token's numbers: ranks are multiples of it."""

# Sums in any order, so that they become vector instructions; not-a-number and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "nsz"}
_compiled = numba.njit(fastmath=_FASTMATH, nogil=True, error_model="numpy")


@numba.njit(parallel=True, nogil=True, error_model="numpy")
def add_tasks(out, x, V, U_T, ends, cores, positions, starts, rows, slots):
    """Semantics: the three lines above, for every token of every task and every slice i.

    out (T, D) is changed in place; x (T, d_in); V (C', 1, n R, d_in); U_T (C', R, D), of which slice i has the columns
    ends[i] to ends[i + 1]; cores (S, n, R, R), or (S, n, R) where diagonal; all float32. positions, starts, rows and
    slots (int64) as ``token_index.Tasks`` has them. R is a multiple of UNROLLED.
    """
    for k in numba.prange(len(positions)):
        start, end = starts[k], starts[k + 1]
        _add_task(out, x, V[positions[k], 0], U_T[positions[k]], ends, cores, rows[start:end], slots[start:end])


@_compiled
def _add_task(out, x, V, U_T, ends, cores, rows, slots):
    h = np.empty((len(rows), V.shape[0]), dtype=np.float32)
    mixed = np.empty_like(h)
    _shrink(h, x, V, rows)
    _mix(mixed, h, cores, slots)
    _expand(out, mixed, U_T, ends, rows)


@_compiled
def _shrink(h, x, V, rows):
    for j in range(0, V.shape[0], UNROLLED):
        V0, V1, V2, V3 = V[j], V[j + 1], V[j + 2], V[j + 3]
        for t in range(len(rows)):
            own = x[rows[t]]
            h0, h1, h2, h3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for k in range(len(own)):
                h0 += V0[k] * own[k]
                h1 += V1[k] * own[k]
                h2 += V2[k] * own[k]
                h3 += V3[k] * own[k]
            h[t, j], h[t, j + 1], h[t, j + 2], h[t, j + 3] = h0, h1, h2, h3


@_compiled
def _mix(mixed, h, cores, slots):
    n, R = cores.shape[1], cores.shape[2]
    for t in range(len(slots)):
        for i in range(n):
            own, target = h[t, i * R : (i + 1) * R], mixed[t, i * R : (i + 1) * R]
            core = cores[slots[t], i]
            for p in range(R):
                if cores.ndim == 3:  # settled when this is compiled
                    target[p] = core[p] * own[p]
                else:
                    total = np.float32(0)
                    for q in range(R):
                        total += core[p, q] * own[q]
                    target[p] = total


@_compiled
def _expand(out, mixed, U_T, ends, rows):
    R = U_T.shape[0]
    for i in range(len(ends) - 1):
        start, end = ends[i], ends[i + 1]
        for t in range(len(rows)):
            target, own = out[rows[t], start:end], mixed[t, i * R : (i + 1) * R]
            for r in range(0, R, UNROLLED):
                m0, m1, m2, m3 = own[r], own[r + 1], own[r + 2], own[r + 3]
                U0, U1, U2, U3 = U_T[r, start:end], U_T[r + 1, start:end], U_T[r + 2, start:end], U_T[r + 3, start:end]
                for o in range(len(target)):
                    target[o] += m0 * U0[o] + m1 * U1[o] + m2 * U2[o] + m3 * U3[o]
