"""Keys and values of the batch: never more memory than placement has counted."""

from __future__ import annotations

import pytest
import torch

from serve_app.engine.transformers.kv_cache import KVCache
from serve_app.placement import count_needs

LAYERS, HEADS, HEAD_DIM = 2, 3, 4
CONFIG = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": HEAD_DIM}


@pytest.mark.parametrize(("max_batch", "max_model_len"), [(5, 300), (8, 256), (1, 2), (33, 513)])
def test_a_full_batch_at_its_longest_takes_what_placement_counts(max_batch: int, max_model_len: int) -> None:
    cache = KVCache(LAYERS, max_batch, max_model_len)
    for row in range(max_batch):
        cache.begin_prefill(row, 1, max_model_len - 1)
        for layer in range(LAYERS):
            states = torch.full((1, HEADS, max_model_len - 1, HEAD_DIM), float(row))
            cache.update(states, states, layer)
    cache.begin_decode(torch.full((max_batch,), max_model_len - 1), max_model_len)
    for layer in range(LAYERS):
        last = torch.full((max_batch, HEADS, 1, HEAD_DIM), -1.0)
        keys, _ = cache.update(last, last, layer)
    assert keys.shape == (max_batch, HEADS, max_model_len, HEAD_DIM)
    assert keys[:, 0, 0, 0].tolist() == list(range(max_batch))
    assert (keys[:, :, -1] == -1).all()
    assert cache.size_bytes == count_needs(CONFIG, 0, "float32", max_batch, max_model_len).kv_bytes
