"""What the plugin's processes are told through ``additional_config``: how much room to make, and how to compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import ConfigError

SECTION = "compress_then_serve"
"""Our key in vLLM's ``additional_config``."""

Products = Literal["grouped", "numba", "static", "triton"]

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's ``max_lora_rank`` that we use."""


@dataclass(frozen=True)
class PluginSettings:
    """Room in each adapted layer: ``num_clusters`` bases of at most ``rank`` with ``slots_per_cluster`` cores each,
    and ``num_factor_slots`` truncated or raw adapters, whose rank vLLM's ``max_lora_rank`` bounds.

    ``is_diagonal`` cores are vectors. ``products``: ``grouped`` and ``numba``, for CPUs, sort a step's tokens by home
    on the host, and run torch's products for each home, or this project's CPU kernel (float32). ``static`` and
    ``triton`` have one fixed sequence of kernels whatever is in the batch, safe under CUDA graphs and torch.compile:
    vLLM's own shrink and expand around torch's products, or this project's GPU kernels.
    """

    num_clusters: int
    slots_per_cluster: int
    rank: int
    num_factor_slots: int
    is_diagonal: bool
    products: Products

    @property
    def is_static(self) -> bool:
        return self.products in ("static", "triton")

    def of_factors(self, rank: int) -> PluginSettings:
        """For a stack of truncated and raw adapters, of ``rank`` at most: each a basis with the identity as core."""
        return dataclasses.replace(
            self, num_clusters=self.num_factor_slots, slots_per_cluster=1, rank=rank, num_factor_slots=0
        )

    def to_config(self) -> dict[str, Any]:
        return {SECTION: dataclasses.asdict(self)}

    @staticmethod
    def of(additional_config: Any) -> PluginSettings | None:
        """None where the engine is not ours. Raises ConfigError for a section that we did not write."""
        section = additional_config.get(SECTION) if isinstance(additional_config, dict) else None
        if section is None:
            return None
        known = {field.name for field in dataclasses.fields(PluginSettings)}
        if not isinstance(section, dict) or section.keys() != known:
            raise ConfigError(
                f"additional_config[{SECTION!r}] is {section!r}, expected exactly the keys {', '.join(sorted(known))}; "
                "it is written by this project's engine, not by hand"
            )
        return PluginSettings(**section)


def slot_rank(rank: int) -> int:
    """The smallest ``max_lora_rank`` of vLLM's that holds ``rank``. Raises ConfigError above the largest."""
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(
        f"a truncated or raw adapter has rank {rank}, vLLM's LoRA slots hold {RANKS[-1]} at most; compress the "
        "collection with a higher gate, or set engine to transformers"
    )
