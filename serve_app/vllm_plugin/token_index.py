"""Whose the tokens of a step are: LoRA ids in, places in the stacks out.

Host work of a step is O(tokens + distinct adapters in the batch), whatever the number of adapters that could be
asked for: an adapter that nobody asks for exists here not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from serve_app.vllm_plugin.settings import PluginSettings

_PLACE = re.compile(r"cts:/(?P<home>.+)#(?P<slot>[0-9]+)")


@dataclass(frozen=True)
class Place:
    """Where an adapter's weights are: ``position`` is its basis in the stacks, ``slot`` its core there; a truncated
    or raw adapter has no basis (None), and ``slot`` is vLLM's own LoRA slot."""

    position: int | None
    slot: int


def write_path(home: str, slot: int) -> str:
    """What a request carries as its ``lora_path``: of a LoRARequest only vLLM's own fields survive the wire."""
    return f"cts:/{home}#{slot}"


def read_path(path: str) -> tuple[str, int]:
    match = _PLACE.fullmatch(path)
    if match is None:
        raise ValueError(f"LoRA path {path!r} was not written by this project's engine")
    return match["home"], int(match["slot"])


@dataclass(frozen=True)
class BasisTokens:
    """A step's tokens on bases, those of one basis next to each other: ``sizes[k]`` of them on ``positions[k]``.

    ``rows`` (T_b,) int64 are their rows in the step, None where they are all of it, as they stand; ``slots`` (T_b,)
    int64 their flat core indices (position x slots_per_cluster + slot), in the same order.
    """

    positions: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: Tensor | None
    slots: Tensor


@dataclass(frozen=True)
class FactorTokens:
    """The tokens of one truncated or raw adapter; ``rows`` as in BasisTokens."""

    slot: int
    rows: Tensor | None


@dataclass(frozen=True)
class SortedTokens:
    """The same on the device at fixed addresses, for the Triton kernels. ``order`` (max_tokens,) int32: rows in the
    order of their bases; those of basis c stand at starts[c] <= k < starts[c + 1]; ``starts`` (C + 1,) int32. Rows
    without a basis, and padding, stand nowhere. ``slots`` (max_tokens,) int64: each row's flat core index, by row.
    """

    order: Tensor
    starts: Tensor
    slots: Tensor


@dataclass
class TokenIndex:
    """The current step's, written by ``set`` between two forward passes and read by every layer.

    Padded tokens read the buffers too, and so does a captured graph's warm-up: each entry is always a valid slot;
    those without an adapter stand on the last one, which is always zero.
    """

    settings: PluginSettings
    max_tokens: int
    device: torch.device
    on_bases: BasisTokens | None = None
    on_factors: list[FactorTokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.zero_slot = self.settings.num_clusters * self.settings.slots_per_cluster
        self.core_slots = torch.full((self.max_tokens,), self.zero_slot, dtype=torch.int64, device=self.device)
        self.sorted = SortedTokens(
            torch.zeros(self.max_tokens, dtype=torch.int32, device=self.device),
            torch.zeros(self.settings.num_clusters + 1, dtype=torch.int32, device=self.device),
            self.core_slots,
        )

    def set(self, ids: Sequence[int], places: Mapping[int, Place]) -> tuple[int, ...]:
        """``ids``: each token's LoRA id, 0 for the base. Returns each token's basis position + 1, 0 without one."""
        unique, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        found = [places[int(lora_id)] if lora_id > 0 else None for lora_id in unique]
        slots = np.array([self._flat(place) for place in found], dtype=np.int64)
        positions = np.array([_position(place) for place in found], dtype=np.int64)
        if self.settings.products == "grouped":
            self._group(found, slots, positions, inverse)
        else:
            self.core_slots.fill_(self.zero_slot)
            self.core_slots[: len(inverse)].copy_(torch.from_numpy(slots[inverse]))
        if self.settings.products == "triton":
            own = positions[inverse]
            order = np.argsort(own, kind="stable")
            starts = np.searchsorted(own[order], np.arange(self.settings.num_clusters + 1))
            self.sorted.order[: len(order)].copy_(torch.from_numpy(order))
            self.sorted.starts.copy_(torch.from_numpy(starts))
        return tuple((positions + 1)[inverse].tolist())

    def _group(
        self, found: Sequence[Place | None], slots: np.ndarray, positions: np.ndarray, inverse: np.ndarray
    ) -> None:
        own = positions[inverse]
        # Stable, so that tokens of one basis alone stay as they stand.
        order = np.argsort(own, kind="stable")
        order = order[np.searchsorted(own[order], 0) :]
        self.on_bases = None
        if len(order):
            present, sizes = np.unique(own[order], return_counts=True)
            in_place = len(present) == 1 and len(order) == len(inverse)
            self.on_bases = BasisTokens(
                tuple(present.tolist()),
                tuple(sizes.tolist()),
                None if in_place else torch.from_numpy(order),
                torch.from_numpy(slots[inverse[order]]),
            )
        self.on_factors = []
        for number, place in enumerate(found):
            if place is not None and place.position is None:
                rows = np.flatnonzero(inverse == number)
                self.on_factors.append(
                    FactorTokens(place.slot, None if len(rows) == len(inverse) else torch.from_numpy(rows))
                )

    def _flat(self, place: Place | None) -> int:
        if place is None or place.position is None:
            return self.zero_slot
        return place.position * self.settings.slots_per_cluster + place.slot


def _position(place: Place | None) -> int:
    return -1 if place is None or place.position is None else place.position
