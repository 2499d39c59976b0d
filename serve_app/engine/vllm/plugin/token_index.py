"""Whose the tokens of a step are: LoRA ids in, places in the stacks out.

Host work of a step is O(tokens + distinct adapters in the batch), whatever the number of adapters that could be
asked for: an adapter that nobody asks for exists here not at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from serve_app.engine.vllm.plugin.settings import PluginSettings

MAX_TASK_TOKENS = 8
"""Few enough for several threads where all tokens are on one basis, which is read once a task."""

Positions = np.ndarray

_PATH = re.compile(r"cts:/(?P<home>[^#]+)#(?P<served>.+)")


@dataclass(frozen=True)
class Place:
    """Where an adapter's weights are: ``position`` is its basis in the stacks, ``slot`` its core there. A truncated or
    raw adapter has a position of its own, in the stacks of a ``bucket`` (of PluginSettings.factor_slots); -1 for none,
    like the base."""

    position: int
    slot: int = 0
    bucket: int | None = None


def write_path(home: str, served: str) -> str:
    """What a request carries as its ``lora_path``: of a LoRARequest only vLLM's own fields survive the wire. ``home``
    is a cluster or a stack of factors by its plain name, in which ``served`` has one place, whatever revisions have it.
    """
    return f"cts:/{home}#{served}"


def read_path(path: str) -> tuple[str, str]:
    match = _PATH.fullmatch(path)
    if match is None:
        raise ValueError(f"LoRA path {path!r} was not written by this project's engine")
    return match["home"], match["served"]


@dataclass(frozen=True)
class Groups:
    """A step's tokens on bases (``grouped`` products), those of one basis next to each other: ``sizes[k]`` of them on
    ``positions[k]``.

    ``rows`` (T_b,) int64 are their rows in the step, None where they are all of it, as they stand; ``slots`` (T_b,)
    int64 their flat core indices (position x slots_per_cluster + slot), in the same order.
    """

    positions: tuple[int, ...]
    sizes: tuple[int, ...]
    rows: Tensor | None
    slots: Tensor

    @classmethod
    def make(
        cls, positions: Positions, sizes: np.ndarray, rows: np.ndarray, slots: np.ndarray, num_tokens: int
    ) -> Groups:
        """``sizes``: how many of the tokens, which are in the order of their bases, each of ``positions`` has."""
        in_place = len(positions) == 1 and len(rows) == num_tokens
        return cls(
            tuple(positions.tolist()),
            tuple(sizes.tolist()),
            None if in_place else torch.from_numpy(rows),
            torch.from_numpy(slots),
        )


@dataclass(frozen=True)
class Tasks:
    """The same for ``numba`` products, in tasks of MAX_TASK_TOKENS at most, all int64: task k has the basis
    ``positions[k]`` and the tokens ``starts[k]`` to ``starts[k + 1]`` of ``rows`` and ``slots`` (both (T_b,)).
    ``num_tokens`` are the step's: rows are below it."""

    positions: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    num_tokens: int

    @classmethod
    def make(
        cls, positions: Positions, sizes: np.ndarray, rows: np.ndarray, slots: np.ndarray, num_tokens: int
    ) -> Tasks:
        """``sizes``: how many of the tokens, which are in the order of their bases, each of ``positions`` has."""
        pieces = -(-sizes // MAX_TASK_TOKENS)
        own = np.repeat(np.arange(len(sizes)), pieces)
        number = np.arange(len(own)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        firsts = (np.cumsum(sizes) - sizes)[own] + number * MAX_TASK_TOKENS
        return cls(positions[own], np.append(firsts, len(rows)), rows, slots, num_tokens)

    @classmethod
    def none(cls) -> Tasks:
        nothing = np.zeros(0, dtype=np.int64)
        return cls.make(nothing, nothing, nothing, nothing, 0)


SortedTokens = Groups | Tasks


@dataclass
class TokenIndex:
    """The current step's, written by ``set`` between two forward passes and read by every layer.

    ``on_bases`` and ``on_factors`` (``grouped`` and ``numba`` products): the tokens on clusters' bases, and, a bucket
    each, those of truncated and raw adapters, each of which counts as a basis; None where there are none. The core of
    all of these is number 0.
    ``core_slots`` (max_tokens,) int64: each row's flat core index (``static`` and ``triton`` products). ``order``
    (max_tokens,) int32 and ``starts`` (C + 1,) int32, of ``triton``: rows in the order of their bases; those of basis c
    stand at starts[c] <= k < starts[c + 1], rows without a basis and padding nowhere. All at fixed addresses.

    Padded tokens read the buffers too, and so does a captured graph's warm-up: each entry is always a valid slot;
    those without an adapter stand on the last one, which is always zero.
    """

    settings: PluginSettings
    max_tokens: int
    device: torch.device
    on_bases: SortedTokens | None = None
    on_factors: tuple[SortedTokens | None, ...] = ()

    def __post_init__(self) -> None:
        self.zero_slot = self.settings.num_clusters * self.settings.slots_per_cluster
        self.core_slots = torch.full((self.max_tokens,), self.zero_slot, dtype=torch.int64, device=self.device)
        self.order = torch.zeros(self.max_tokens, dtype=torch.int32, device=self.device)
        self.starts = torch.zeros(self.settings.num_clusters + 1, dtype=torch.int32, device=self.device)
        self.on_factors = (None,) * len(self.settings.factor_slots)

    def set(self, ids: Sequence[int], places: Mapping[int, Place]) -> tuple[Positions, ...]:
        """``ids``: each token's LoRA id, 0 for the base. Returns each token's position among the bases, and then in the
        stack of each bucket, (T,) int64, -1 for none."""
        unique, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        found = [places[int(lora_id)] if lora_id > 0 else None for lora_id in unique]
        slots = np.array([self._flat(place) for place in found], dtype=np.int64)
        buckets = range(len(self.settings.factor_slots))
        on_bases, *on_factors = (
            np.array([_position(place, bucket) for place in found], dtype=np.int64)[inverse]
            for bucket in (None, *buckets)
        )
        if self.settings.is_static:
            self.core_slots.fill_(self.zero_slot)
            self.core_slots[: len(inverse)].copy_(torch.from_numpy(slots[inverse]))
        else:
            no_core = np.zeros(len(inverse), dtype=np.int64)
            self.on_bases = self._sorted(on_bases, slots[inverse])
            self.on_factors = tuple(self._sorted(positions, no_core) for positions in on_factors)
        if self.settings.products == "triton":
            order = np.argsort(on_bases, kind="stable")
            starts = np.searchsorted(on_bases[order], np.arange(self.settings.num_clusters + 1))
            self.order[: len(order)].copy_(torch.from_numpy(order))
            self.starts.copy_(torch.from_numpy(starts))
        return on_bases, *on_factors

    def _sorted(self, positions: Positions, slots: np.ndarray) -> SortedTokens | None:
        """``positions`` (T,), -1 for none; ``slots`` (T,) their cores."""
        # Stable, so that tokens that are all on one basis stay as they stand.
        order = np.argsort(positions, kind="stable")
        present, sizes = np.unique(positions, return_counts=True)
        if -1 in present[:1]:
            order, present, sizes = order[sizes[0] :], present[1:], sizes[1:]
        if not len(present):
            return None
        kind = Tasks if self.settings.products == "numba" else Groups
        return kind.make(present, sizes, order, slots[order], len(positions))

    def _flat(self, place: Place | None) -> int:
        if place is None or place.bucket is not None:
            return self.zero_slot
        return place.position * self.settings.slots_per_cluster + place.slot


def _position(place: Place | None, bucket: int | None) -> int:
    return place.position if place is not None and place.bucket == bucket else -1
