"""What the plugin's processes are told through ``additional_config``: how much room to make, and how to compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cluster.errors import ConfigError

SECTION = "compress_then_serve"
"""Our key in vLLM's ``additional_config``."""

Products = Literal["grouped", "numba", "static", "triton"]


@dataclass(frozen=True)
class PluginSettings:
    """Room in each adapted layer: ``num_clusters`` bases of at most ``rank`` with ``slots_per_cluster`` cores each; and
    stacks of truncated and raw adapters: a ``padded_rank`` each, and for how many adapters of it there is room.

    ``is_diagonal`` cores are vectors. ``products``: ``grouped`` and ``numba``, for CPUs, sort a step's tokens by home
    on the host, and run torch's products for each home, or this project's CPU kernel (float32). ``static`` and
    ``triton`` have one fixed sequence of kernels whatever is in the batch, safe under CUDA graphs and torch.compile:
    vLLM's own shrink and expand around torch's products, or this project's GPU kernels.
    """

    num_clusters: int
    slots_per_cluster: int
    rank: int
    factor_slots: tuple[tuple[int, int], ...]
    is_diagonal: bool
    products: Products

    @property
    def is_static(self) -> bool:
        return self.products in ("static", "triton")

    def of_factors(self, bucket: int) -> PluginSettings:
        """For that stack of truncated and raw adapters: each has a position of its own, like a basis with one core."""
        rank, slots = self.factor_slots[bucket]
        return dataclasses.replace(self, num_clusters=slots, slots_per_cluster=1, rank=rank, factor_slots=())

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
        slots = tuple((rank, slots) for rank, slots in section["factor_slots"])
        return PluginSettings(**section | {"factor_slots": slots})


def padded_rank(rank: int, products: Products) -> int:
    """What factors of ``rank`` are filled up to with zeros: a power of two, so that a layer has few stacks, one call
    each, whatever the ranks; no less than the CPU kernel reads at once, or vLLM's own kernels are given by vLLM."""
    least = 8 if products in ("static", "triton") else 4
    return max(least, 1 << (rank - 1).bit_length())
