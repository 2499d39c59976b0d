"""Room for adapters at fixed places: one for each served revision, however many homes have it."""

from __future__ import annotations

from collections.abc import Collection, Iterable


class Room:
    """Places 0 to ``size`` - 1."""

    def __init__(self, size: int) -> None:
        self._free = list(reversed(range(size)))
        self._places: dict[str, int] = {}
        self._holders: dict[str, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def place_of(self, served: str) -> int | None:
        return self._places.get(served)

    def lacks(self, served: Iterable[str]) -> int:
        """How many of these are not here yet."""
        return len(set(served) - self._places.keys())

    def take(self, served: Collection[str]) -> tuple[dict[str, int], set[str]]:
        """Where these are from now on, and which were not here before: those are to be written. One holder more for
        each. There must be room."""
        new = set(served) - self._places.keys()
        for name in sorted(new):
            self._places[name] = self._free.pop()
        for name in set(served):
            self._holders[name] = self._holders.get(name, 0) + 1
        return {name: self._places[name] for name in set(served)}, new

    def give_back(self, served: Iterable[str]) -> list[int]:
        """One holder less for each. The places that are free now."""
        freed = []
        for name in sorted(set(served)):
            self._holders[name] -= 1
            if not self._holders[name]:
                del self._holders[name]
                freed.append(self._places.pop(name))
        self._free += reversed(freed)
        return freed
