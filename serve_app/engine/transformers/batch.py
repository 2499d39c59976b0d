"""The sequences that are being answered, one row each, and the two forward passes over them.

Shapes: n rows, k new rows, L the longest of their prompts, c the longest row after the pass, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cluster.layer import group_tokens
from serve_app.engine.transformers.adapted_linear import AdaptedLinears
from serve_app.engine.transformers.base_model import BaseModel
from serve_app.engine.transformers.generation import Generation
from serve_app.engine.transformers.kv_cache import KVCache


class Batch:
    """Rows of any homes, and of none, side by side; all passes return logits (rows, V) in float32."""

    def __init__(
        self, base: BaseModel, linears: AdaptedLinears, device: torch.device, max_rows: int, max_tokens: int
    ) -> None:
        self.rows: list[Generation] = []
        self._model, self._linears, self._device = base.model, linears, device
        self._cache = KVCache(base.num_layers, max_rows, max_tokens)

    def prefill(self, new: Sequence[Generation]) -> Tensor:
        """Take ``new`` in at the end and run their prompts, padded on the right: attention is causal, so
        no token sees the padding behind it."""
        length = max(len(generation.prompt_ids) for generation in new)
        padded = [generation.prompt_ids + [0] * (length - len(generation.prompt_ids)) for generation in new]
        self._cache.begin_prefill(len(self.rows), len(new), length)
        self.rows.extend(new)
        # The vocabulary is far wider than the hidden state: only positions where some prompt ends are projected.
        ends = sorted({len(generation.prompt_ids) - 1 for generation in new})
        logits = self._forward(
            new, padded, torch.arange(length, device=self._device)[None].expand(len(new), -1), None, ends
        )
        chosen = [ends.index(len(generation.prompt_ids) - 1) for generation in new]
        return logits[list(range(len(new))), chosen]

    def decode(self) -> Tensor:
        """Run the last token of every row."""
        last_tokens = [[generation.output_ids[-1]] for generation in self.rows]
        positions = torch.tensor([generation.num_tokens - 1 for generation in self.rows], device=self._device)  # (n,)
        length = max(generation.num_tokens for generation in self.rows)
        mask = torch.arange(length, device=self._device) <= positions[:, None]  # (n, c)
        self._cache.begin_decode(positions, length)
        return self._forward(self.rows, last_tokens, positions[:, None], mask[:, None, None], [0])[:, 0]

    def remove(self, leaving: Iterable[Generation]) -> None:
        """Free the rows of ``leaving``; the last rows move into the holes."""
        for generation in leaving:
            row, last = self.rows.index(generation), len(self.rows) - 1
            self._cache.remove(row, last)
            self.rows[row] = self.rows[last]
            self.rows.pop()
        if not self.rows:
            self._cache.clear()

    def _forward(
        self,
        generations: Sequence[Generation],
        token_ids: list[list[int]],
        positions: Tensor,
        mask: Tensor | None,
        kept: list[int],
    ) -> Tensor:
        """Logits (rows, len(kept), V); ``mask`` (rows, 1, 1, c) is True where attention may look."""
        self._linears.groups = group_tokens(
            [generation.home for generation in generations],
            [generation.slot for generation in generations],
            [len(row) for row in token_ids],
            self._device,
        )
        output = self._model(
            input_ids=torch.tensor(token_ids, device=self._device),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(kept, device=self._device),
        )
        logits: Tensor = output.logits
        return logits.float()
