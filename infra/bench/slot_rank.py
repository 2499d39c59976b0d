"""The rank of vLLM's own LoRA slots, for the rows and kernels of vLLM's that ours are measured beside."""

from __future__ import annotations

from cluster.errors import ConfigError

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that ``max_lora_rank`` may have, but for 1."""


def slot_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` that holds ``rank``. Raises ConfigError above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(f"an adapter has rank {rank}, vLLM's LoRA slots hold {RANKS[-1]} at most; leave it out")
