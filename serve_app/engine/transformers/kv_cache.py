"""Keys and values of a batch whose rows are sequences of different lengths.

Shapes: n rows in use, h key/value heads, c capacity in tokens, d head dimension, k rows being prefilled,
L their longest prompt. Row i holds sequence i of the batch; the rows in use are always the first n, so
that attention reads a slice and copies nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

_BLOCK_TOKENS = 256


@dataclass(frozen=True)
class _Prefill:
    """The k new rows from ``first_row`` on get their first ``length`` tokens."""

    first_row: int
    num_rows: int
    length: int


@dataclass(frozen=True)
class _Decode:
    """Row i gets one token, at positions[i]; the longest row then has ``length`` tokens."""

    rows: Tensor  # (n,) int64: 0 .. n - 1
    positions: Tensor  # (n,) int64
    num_rows: int
    length: int


class KVCache(Cache):
    """What the model takes as ``past_key_values``; ``begin_*`` says what the next forward pass is about.

    Prefilled rows see only themselves, so their keys are written and handed back as they came. No row is
    ever read by another sequence, and a row is zeroed when it leaves: nothing is shared between requests,
    much less between served revisions. It never holds more than ``max_rows`` rows of ``max_tokens`` tokens, which
    is what placement counts on.
    """

    def __init__(self, num_layers: int, max_rows: int, max_tokens: int) -> None:
        super().__init__(layers=[_Layer(max_rows, max_tokens) for _ in range(num_layers)])

    def begin_prefill(self, first_row: int, num_rows: int, length: int) -> None:
        for layer in self.layers:
            layer.step = _Prefill(first_row, num_rows, length)

    def begin_decode(self, positions: Tensor, length: int) -> None:
        num_rows = len(positions)
        rows = torch.arange(num_rows, device=positions.device)
        for layer in self.layers:
            layer.step = _Decode(rows, positions, num_rows, length)

    def remove(self, row: int, last: int) -> None:
        """Row ``row`` leaves, and row ``last``, the end of those in use, takes its place."""
        for layer in self.layers:
            layer.remove(row, last)

    def clear(self) -> None:
        """Give the memory back."""
        for layer in self.layers:
            layer.keys = layer.values = None

    @property
    def size_bytes(self) -> int:
        buffers = [buffer for layer in self.layers for buffer in (layer.keys, layer.values) if buffer is not None]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


class _Layer(DynamicLayer):
    """keys and values are (rows, h, c, d), both grown on demand; None before the first prefill."""

    is_croppable = False
    keys: Any
    values: Any

    def __init__(self, max_rows: int, max_tokens: int) -> None:
        super().__init__()
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self.step: _Prefill | _Decode = _Prefill(0, 0, 0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        step = self.step
        if isinstance(step, _Prefill):
            end = step.first_row + step.num_rows
            self._reserve(key_states, value_states, end, step.length)
            self.keys[step.first_row : end, :, : step.length] = key_states
            self.values[step.first_row : end, :, : step.length] = value_states
            return key_states, value_states
        self._reserve(key_states, value_states, step.num_rows, step.length)
        self.keys[step.rows, :, step.positions] = key_states[:, :, 0]
        self.values[step.rows, :, step.positions] = value_states[:, :, 0]
        return self.keys[: step.num_rows, :, : step.length], self.values[: step.num_rows, :, : step.length]

    def remove(self, row: int, last: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[row] = buffer[last]
            # Attention gives what is past a row's end the weight 0; but 0 times a NaN left there is NaN.
            buffer[last] = 0

    # Asked for a forward pass without an explicit mask, which here is a prefill: nothing precedes it.

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def _reserve(self, key_states: Tensor, value_states: Tensor, num_rows: int, length: int) -> None:
        rows_now, capacity_now = (0, 0) if self.keys is None else (self.keys.shape[0], self.keys.shape[2])
        if num_rows <= rows_now and length <= capacity_now:
            return
        rows = max(rows_now, min(1 << (num_rows - 1).bit_length(), self._max_rows))
        capacity = max(capacity_now, min(-(-length // _BLOCK_TOKENS) * _BLOCK_TOKENS, self._max_tokens))
        self.keys = _grown(self.keys, key_states, rows, capacity)
        self.values = _grown(self.values, value_states, rows, capacity)


def _grown(buffer: Tensor | None, states: Tensor, rows: int, capacity: int) -> Tensor:
    """Zeros (rows, h, capacity, d) with the old buffer's content."""
    grown = states.new_zeros(rows, states.shape[1], capacity, states.shape[3])
    if buffer is not None:
        grown[: buffer.shape[0], :, : buffer.shape[2]] = buffer
    return grown
