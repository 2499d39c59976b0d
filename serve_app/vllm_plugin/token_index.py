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

MAX_TASK_TOKENS = 8
"""Few enough for several threads where all tokens are on one basis, which is read once a task."""

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
    """A step's tokens on bases (``grouped`` products), those of one basis next to each other: ``sizes[k]`` of them on
    ``positions[k]``.

    ``rows`` (T_b,) int64 are their rows in the step, None where they are all of it, as they stand; ``slots`` (T_b,)
    int64 their flat core indices (position x slots_per_cluster + slot), in the same order.
    """

    positions: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: Tensor | None
    slots: Tensor


@dataclass(frozen=True)
class Tasks:
    """The same for ``numba`` products, in tasks of MAX_TASK_TOKENS at most, all int64: task k has the basis
    ``positions[k]`` and the tokens ``starts[k]`` to ``starts[k + 1]`` of ``rows`` and ``slots`` (both (T_b,))."""

    positions: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    slots: np.ndarray

    @classmethod
    def split(cls, sizes: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> Tasks:
        """``sizes`` (C,): how many of the tokens, which are in the order of their bases, each basis has."""
        pieces = -(-sizes // MAX_TASK_TOKENS)
        positions = np.repeat(np.arange(len(sizes)), pieces)
        number = np.arange(len(positions)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        firsts = (np.cumsum(sizes) - sizes)[positions] + number * MAX_TASK_TOKENS
        return cls(positions, np.append(firsts, len(rows)), rows, slots)


@dataclass(frozen=True)
class FactorTokens:
    """The tokens of one truncated or raw adapter; ``rows`` as in BasisTokens."""

    slot: int
    rows: Tensor | None


@dataclass
class TokenIndex:
    """The current step's, written by ``set`` between two forward passes and read by every layer.

    ``core_slots`` (max_tokens,) int64: each row's flat core index (``static`` and ``triton`` products). ``order``
    (max_tokens,) int32 and ``starts`` (C + 1,) int32, of ``triton``: rows in the order of their bases; those of basis c
    stand at starts[c] <= k < starts[c + 1], rows without a basis and padding nowhere. All at fixed addresses.

    Padded tokens read the buffers too, and so does a captured graph's warm-up: each entry is always a valid slot;
    those without an adapter stand on the last one, which is always zero.
    """

    settings: PluginSettings
    max_tokens: int
    device: torch.device
    on_bases: BasisTokens | None = None
    tasks: Tasks | None = None
    on_factors: list[FactorTokens] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.zero_slot = self.settings.num_clusters * self.settings.slots_per_cluster
        self.core_slots = torch.full((self.max_tokens,), self.zero_slot, dtype=torch.int64, device=self.device)
        self.order = torch.zeros(self.max_tokens, dtype=torch.int32, device=self.device)
        self.starts = torch.zeros(self.settings.num_clusters + 1, dtype=torch.int32, device=self.device)

    def set(self, ids: Sequence[int], places: Mapping[int, Place]) -> tuple[int, ...]:
        """``ids``: each token's LoRA id, 0 for the base. Returns each token's basis position + 1, 0 without one."""
        unique, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        found = [places[int(lora_id)] if lora_id > 0 else None for lora_id in unique]
        slots = np.array([self._flat(place) for place in found], dtype=np.int64)
        positions = np.array([_position(place) for place in found], dtype=np.int64)
        by_token = positions[inverse]
        if self.settings.is_static:
            self.core_slots.fill_(self.zero_slot)
            self.core_slots[: len(inverse)].copy_(torch.from_numpy(slots[inverse]))
        if self.settings.products != "static":
            # Stable, so that tokens that are all on one basis stay as they stand.
            order = np.argsort(by_token, kind="stable")
            starts = np.searchsorted(by_token[order], np.arange(self.settings.num_clusters + 1))
            if not self.settings.is_static:
                self._group(found, slots, inverse, order, starts)
            else:
                self.order[: len(order)].copy_(torch.from_numpy(order))
                self.starts.copy_(torch.from_numpy(starts))
        return tuple((by_token + 1).tolist())

    def _group(
        self,
        found: Sequence[Place | None],
        slots: np.ndarray,
        inverse: np.ndarray,
        order: np.ndarray,
        starts: np.ndarray,
    ) -> None:
        own, sizes = order[starts[0] :], np.diff(starts)
        self.on_bases = self.tasks = None
        if len(own) and self.settings.products == "numba":
            self.tasks = Tasks.split(sizes, own, slots[inverse[own]])
        elif len(own):
            present = np.flatnonzero(sizes)
            in_place = len(present) == 1 and len(own) == len(inverse)
            self.on_bases = BasisTokens(
                tuple(present.tolist()),
                tuple(sizes[present].tolist()),
                None if in_place else torch.from_numpy(own),
                torch.from_numpy(slots[inverse[own]]),
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
