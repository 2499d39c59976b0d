"""What an engine says of its homes, and whether an adapter can be asked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cluster.bundle.serving_map import ServedAdapter, ServingMap
from cluster.errors import HomeUnavailable

READY = "ready"


class HomeStates:
    """``homes``: home -> READY, or why it is unavailable. ``adapters``: id -> why, of those that are unavailable
    though their home is ready. No lock of its own."""

    def __init__(self, homes: Iterable[str], serving_map: ServingMap) -> None:
        self.homes = dict.fromkeys(homes, "not loaded yet")
        self.adapters: dict[str, str] = {}
        self._serving_map = serving_map

    def set(self, home: str, state: str, failed: Mapping[int, str] | None = None) -> None:
        """``failed``: slot of a home that is READY -> what is wrong with its adapter."""
        members = self._serving_map.members(home)
        for adapter_id in members.values():
            self.adapters.pop(adapter_id, None)
        self.homes[home] = state
        # A slot that the map gives to nobody cannot be asked anyway.
        self.adapters |= {members[slot]: why for slot, why in (failed or {}).items() if slot in members}

    def check(self, served: ServedAdapter | None) -> None:
        """Raises HomeUnavailable where the adapter (None: the base) cannot be asked."""
        if served is None:
            return
        state = self.homes.get(served.home, "not given to this engine")
        if state != READY:
            raise HomeUnavailable(f"home {served.home!r} is not being served: {state}")
        if why := self.adapters.get(served.adapter_id):
            raise HomeUnavailable(f"adapter {served.adapter_id!r} is not being served: {why}")
