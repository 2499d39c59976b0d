"""Adapter id -> where it lives and what it is answered with; read from a revision's manifest.

A **home** is what must be resident for an adapter to be answered: ``cluster:0`` for an adapter on a basis,
``factors:odd-one`` for a truncated or raw one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from cluster.bundle.manifest import Manifest
from cluster.errors import UnknownAdapter


def cluster_home(cluster: str) -> str:
    return f"cluster:{cluster}"


def factors_home(adapter_id: str) -> str:
    return f"factors:{adapter_id}"


@dataclass(frozen=True)
class ServedAdapter:
    """``slot`` is the row of the home's cores; a home of factors has the one slot 0. ``chat_template``: the
    adapter's own text, None where chats go through the base's. ``brought``: as the manifest has it."""

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
            on_basis = adapter.cluster is not None
            entries[adapter_id] = ServedAdapter(
                adapter_id=adapter_id,
                home=cluster_home(str(adapter.cluster)) if on_basis else factors_home(adapter_id),
                slot=int(adapter.slot or 0),
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
        needed: Counter[str] = Counter()
        for served in self.adapters.values():
            needed[served.home] = max(needed[served.home], served.slot + 1)
        return needed

    def homes(self) -> list[str]:
        """Every home once, clusters first."""
        return sorted({adapter.home for adapter in self.adapters.values()})
