"""Where `add` and `update` take adapters from, and whether the ids that were named are there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cluster.adapters.layout import Layout
from cluster.bundle.manifest import Manifest
from cluster.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """Where adapters come from, as given on the command line. ``ids`` empty: whatever qualifies. ``restore``: adapters
    that were removed, to be taken up again.
    ``checkpoints``, ``id_patterns``: as a ``Layout`` has them."""

    out: str
    adapters: str
    base: str
    ids: tuple[str, ...] = ()
    accept_base: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()
    checkpoints: bool = False
    id_patterns: tuple[str, ...] = ()

    def layout(self, manifest: Manifest) -> Layout:
        """As the bundle's collection was read before, but for what is asked now; for all later revisions."""
        patterns = self.id_patterns or manifest.layout.id_patterns
        return Layout(patterns, manifest.layout.checkpoints or self.checkpoints)


def need_known(ids: Collection[str], known: Collection[str], option: str, expected: str) -> None:
    """Raises ConfigError that names every id which is not known."""
    if unknown := sorted(set(ids) - set(known)):
        raise ConfigError(f"{option} {', '.join(unknown)}: {expected}")
