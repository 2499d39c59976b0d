"""Adapter id -> where it lives and what it is answered with; read from a revision's manifest.

A **home** is what must be resident for an adapter to be answered: ``cluster:0`` for an adapter on a basis,
``factors:2.0`` for truncated and raw ones of rank 2, as many as a home of that rank has slots; the next are in
``factors:2.1``. Whole homes are placed and loaded: theirs are few, however many adapters stand alone, and none is
larger than what a group can well take on top.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import cast

from cluster.bundle.manifest import Manifest
from cluster.errors import UnknownAdapter


def cluster_home(cluster: str) -> str:
    return f"cluster:{cluster}"


HOME_RANKS = 512
"""What the ranks of a factors home's adapters add up to at most: 0.8 GB for q, k and v of a 7B model in bfloat16."""


def factors_home(rank: int, slot: int) -> tuple[str, int]:
    """The home of the adapter that has ``slot`` among all of its ``rank``, and its slot there."""
    number, own = divmod(slot, max(1, HOME_RANKS // rank))
    return f"factors:{rank}.{number}", own


def factors_rank(home: str) -> int | None:
    """The rank of a factors home's adapters, None for a cluster."""
    kind, _, name = home.partition(":")
    return int(name.partition(".")[0]) if kind == "factors" else None


def home_of(content: str) -> str:
    """The home that ``ServingMap.by_content`` named so."""
    return content.rpartition("@")[0]


@dataclass(frozen=True)
class ServedAdapter:
    """``slot`` is the row of the home's cores, or of its factors. ``chat_template``: the adapter's own text, None
    where chats go through the base's. ``brought``: as the manifest has it."""

    adapter_id: str
    home: str
    slot: int
    mode: str
    cluster: str | None
    served: str
    version: str
    error: float
    chat_template: str | None = None
    brought: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ServingMap:
    base_name: str
    adapters: Mapping[str, ServedAdapter]

    @staticmethod
    def of(manifest: Manifest) -> ServingMap:
        entries = {}
        for adapter_id, adapter in manifest.adapters.items():
            slot = cast(int, adapter.slot)
            if adapter.rank is not None:
                home, slot = factors_home(adapter.rank, slot)
            else:
                home = cluster_home(str(adapter.cluster))
            entries[adapter_id] = ServedAdapter(
                adapter_id=adapter_id,
                home=home,
                slot=slot,
                mode=adapter.mode,
                cluster=adapter.cluster,
                served=adapter.served,
                version=adapter.version,
                error=adapter.error,
                chat_template=manifest.templates.get(adapter.chat_template or ""),
                brought=adapter.brought,
            )
        return ServingMap(manifest.base.name, MappingProxyType(entries))

    def find(self, adapter_id: str) -> ServedAdapter:
        """Raises UnknownAdapter; there is no fallback to the base."""
        try:
            return self.adapters[adapter_id]
        except KeyError:
            raise UnknownAdapter(f"adapter {adapter_id!r} is not in the serving map") from None

    def with_the_bases_template(self) -> ServingMap:
        """The same, every chat through the base's own template."""
        entries = {i: replace(adapter, chat_template=None) for i, adapter in self.adapters.items()}
        return ServingMap(self.base_name, MappingProxyType(entries))

    def num_slots(self) -> Counter[str]:
        """Home -> the slots that its adapters need of it: one more than the highest."""
        return Counter({home: max(members) + 1 for home, members in self._members.items()})

    def members(self, home: str) -> Mapping[int, str]:
        """Slot -> the adapter that has it; nobody where there is no such home."""
        return self._members.get(home, {})

    def homes(self) -> list[str]:
        """Every home once, clusters first."""
        return sorted(self._members)

    def by_content(self) -> ServingMap:
        """The same, each home named by what is in it too: ``cluster:0@5c1f09...``. What two revisions have in common
        has one name; ``home_of`` takes it back."""
        names = {home: f"{home}@{self._digest(home)}" for home in self._members}
        entries = {i: replace(adapter, home=names[adapter.home]) for i, adapter in self.adapters.items()}
        return ServingMap(self.base_name, MappingProxyType(entries))

    def _digest(self, home: str) -> str:
        # A served revision is a hash of all that its adapter is answered with, the basis included.
        placed = sorted((slot, self.adapters[adapter_id].served) for slot, adapter_id in self.members(home).items())
        return hashlib.sha256(repr(placed).encode()).hexdigest()[:16]

    @cached_property
    def _members(self) -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        for adapter_id, served in self.adapters.items():
            found.setdefault(served.home, {})[served.slot] = adapter_id
        return found
