"""What aliases have to do with a revision: adapters that they send requests to, and names that it takes from them."""

from __future__ import annotations

from cluster.bundle.aliases import Aliases, Targets, alias_faults, read_aliases
from cluster.bundle.manifest import Manifest
from cluster.errors import BundleError, StoreError
from cluster.store.protocol import Store


def needed_by(store: Store) -> dict[str, str]:
    """Adapter id -> an alias that sends requests to it. Raises StoreError, BundleError."""
    aliases, _ = read_aliases(store)
    return {target: name for name, targets in aliases.items() for target, weight in targets.items() if weight > 0}


def fault_lines(aliases: Aliases, manifest: Manifest) -> list[str]:
    """One for each alias that does not do what it says where this revision is served."""
    faults = alias_faults(aliases, manifest.base.name, manifest.adapters)
    return [f"warning    alias {name}: {fault}" for name, fault in sorted(faults.items())]


def warnings(store: Store, manifest: Manifest) -> list[str]:
    """The same, of a revision that is published by now: nothing is raised."""
    try:
        aliases, _ = read_aliases(store)
    except (BundleError, StoreError) as error:
        return [f"warning    whether aliases do what they say cannot be told: {error}"]
    return fault_lines(aliases, manifest)


def shares(targets: Targets) -> str:
    """As people read it: the adapters and which part of the requests each gets."""
    total = sum(targets.values())
    return ", ".join(f"{target} {100 * weight / total:.3g}%" for target, weight in sorted(targets.items()))
