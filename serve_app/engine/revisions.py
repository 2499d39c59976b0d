"""The revisions of a bundle that an engine holds, and what it says of their homes and adapters.

A revision differs from the one before in few adapters. So what is resident is a home by its content (see
``cluster.bundle.serving_map``): two revisions share what they have in common, and of one adapter both may be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.bundle.reading import LoadedHome
from cluster.bundle.serving_map import ServedAdapter, ServingMap, home_of
from cluster.errors import BundleError, HomeUnavailable

READY = "ready"


@dataclass(frozen=True)
class Revision:
    """``homes`` of the map are this engine's. ``load_home`` returns one's verified weights on the CPU, and which of its
    adapters failed; it is called in a worker thread. ``sizes``: home -> its bytes on the device; one that is missing is
    not counted."""

    number: int
    serving_map: ServingMap
    homes: tuple[str, ...]
    load_home: Callable[[str], LoadedHome]
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RevisionHealth:
    """``homes`` maps each home this engine was given to "ready" or to the reason it is unavailable; ``adapters`` those
    that are unavailable in a home that is ready to the reason."""

    homes: dict[str, str] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """What cannot be asked for, and why; nothing where it is whole."""
        told = [f"home {home!r}: {state}" for home, state in self.homes.items() if state != READY]
        return told + [f"adapter {adapter_id!r}: {why}" for adapter_id, why in self.adapters.items()]


@dataclass(frozen=True)
class _Held:
    """``homes``: as the revision calls them -> as they are called here."""

    revision: Revision
    serving_map: ServingMap
    homes: Mapping[str, str]

    @staticmethod
    def of(revision: Revision) -> _Held:
        by_content = revision.serving_map.by_content()
        named = {home_of(home): home for home in by_content.homes()}
        # A cluster without members has no adapter that could name it.
        return _Held(revision, by_content, {home: named.get(home, f"{home}@") for home in revision.homes})


def refusal(number: int, failed: Sequence[str]) -> BundleError:
    """``failed``: what cannot be asked of it, one at least."""
    more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
    return BundleError(f"revision {number} is not taken up: {failed[0]}{more}")


class Revisions:
    """Homes are named by their content, but for those of ``health``. No lock of its own."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._loading: set[int] = set()
        self._states: dict[str, str] = {}
        self._failed: dict[str, Mapping[int, str]] = {}  # home -> slot -> why

    def hold(self, revision: Revision) -> list[str]:
        """Keep what it needs. Returns those of its homes that are not, or not wholly, ready; when they have been loaded
        it is to be confirmed."""
        if revision.number not in self._held:
            self._loading.add(revision.number)
        held = self._held[revision.number] = _Held.of(revision)
        for home in held.homes.values():
            self._states.setdefault(home, "not loaded yet")
        return [home for home in held.homes.values() if self._states[home] != READY or self._failed.get(home)]

    def confirm(self, number: int) -> None:
        """From now on its adapters are found, and ``health`` tells of it."""
        self._loading.discard(number)

    def drop(self, number: int) -> list[str]:
        """Its adapters are found no more. Returns the homes that no other revision has; none where it is not held."""
        self._loading.discard(number)
        if (dropped := self._held.pop(number, None)) is None:
            return []
        kept = {home for held in self._held.values() for home in held.homes.values()}
        gone = [home for home in dropped.homes.values() if home not in kept]
        for home in gone:
            self.record(home, "detached; requests already running on it finish first")
        return gone

    def forget(self, home: str) -> None:
        """It is resident no more; nothing where a revision that came meanwhile has it again."""
        if not self.has(home):
            self._states.pop(home, None)
            self._failed.pop(home, None)

    def failed_of(self, home: str) -> Mapping[int, str] | None:
        """Slot -> what is wrong with its adapter, where the home is READY; else None."""
        return self._failed[home] if self._states.get(home) == READY else None

    def record_failure(self, home: str, error: Exception) -> None:
        """It could not be loaded. One that is READY stays so: it is resident, whatever the store says now."""
        if self._states.get(home) != READY:
            self.record(home, f"{type(error).__name__}: {error}")

    def record(self, home: str, state: str, failed: Mapping[int, str] | None = None) -> None:
        """``failed``: slot of a home that is READY -> what is wrong with its adapter."""
        self._states[home], self._failed[home] = state, failed or {}

    def has(self, home: str) -> bool:
        return any(home in held.homes.values() for held in self._held.values())

    def source(self, home: str) -> tuple[Revision, ServingMap]:
        """A revision that has it, and its map by content. Raises HomeUnavailable where none has."""
        for held in reversed(self._held.values()):
            if home in held.homes.values():
                return held.revision, held.serving_map
        raise HomeUnavailable(f"home {home_of(home)!r} is of no revision that is held")

    def find(self, adapter_id: str, number: int | None = None) -> ServedAdapter:
        """``number`` None: of the one that came last. Raises UnknownAdapter, and HomeUnavailable for a revision that is
        not held."""
        there = [own for own in self._held if own not in self._loading]
        number = next(reversed(there), None) if number is None else number
        if number is None or number not in there:
            told = ", ".join(map(str, there)) or "none"
            raise HomeUnavailable(f"revision {number} is not being served here; of its bundle are: {told}")
        return self._held[number].serving_map.find(adapter_id)

    def check(self, served: ServedAdapter | None) -> None:
        """Raises HomeUnavailable where the adapter (None: the base) cannot be asked."""
        if served is None:
            return
        state = self._states.get(served.home, "not given to this engine")
        if state != READY:
            raise HomeUnavailable(f"home {home_of(served.home)!r} is not being served: {state}")
        if why := self._failed[served.home].get(served.slot):
            raise HomeUnavailable(f"adapter {served.adapter_id!r} is not being served: {why}")

    def health(self) -> dict[int, RevisionHealth]:
        return {number: self._health_of(own) for number, own in self._held.items() if number not in self._loading}

    def newly_failed(self, number: int) -> list[str]:
        """What cannot be asked of it, but for what could not be asked of another one either."""
        others = [held for other, held in self._held.items() if other != number]
        known, there = {b for held in others for b in self._broken(held)}, {h for o in others for h in o.homes.values()}
        own, health = self._held[number].homes, self._health_of(self._held[number])
        homes = {home: state for home, state in health.homes.items() if own[home] not in there}
        new = sorted(self._broken(self._held[number]) - known)
        return RevisionHealth(homes, {adapter_id: health.adapters[adapter_id] for adapter_id, _ in new}).failures()

    def _health_of(self, held: _Held) -> RevisionHealth:
        failed: dict[str, str] = {}
        for home in held.homes.values():
            members = held.serving_map.members(home)
            # A slot that the map gives to nobody cannot be asked anyway.
            failed |= {members[slot]: why for slot, why in self._failed.get(home, {}).items() if slot in members}
        return RevisionHealth({home: self._states[content] for home, content in held.homes.items()}, failed)

    def _broken(self, held: _Held) -> set[tuple[str, str]]:
        """Adapter and served revision of those that fail alone."""
        return {(i, held.serving_map.adapters[i].served) for i in self._health_of(held).adapters}
