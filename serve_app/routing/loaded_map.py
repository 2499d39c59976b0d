"""Who answers to a name: the serving map of one revision, and the aliases over it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from cluster.bundle.aliases import Aliases, Targets, choose_target
from cluster.bundle.serving_map import ServedAdapter, ServingMap
from serve_app.openai.errors import unavailable, unknown_model, unknown_target


@dataclass(frozen=True)
class LoadedMap:
    """The serving map of a revision and what the router says about it. ``groups``: home -> the group that has it.
    ``aliases``: None where they could never be read."""

    revision: int
    serving_map: ServingMap
    base_fingerprint: str
    groups: Mapping[str, str]
    loaded_at: int
    aliases: Aliases | None = None

    @cached_property
    def model_ids(self) -> list[str]:
        """Sorted: the base's name, adapters and aliases."""
        return sorted({self.serving_map.base_name, *self.serving_map.adapters, *(self.aliases or ())})

    def targets(self, model: str) -> Targets | None:
        """Of an alias. None for everything else: where an adapter or the base has the name, that one answers."""
        if model == self.serving_map.base_name or model in self.serving_map.adapters:
            return None
        return (self.aliases or {}).get(model)

    def find(self, model: str, key: bytes) -> ServedAdapter | None:
        """Who answers a request for ``model``; None: the base. ``key`` chooses among an alias's targets.

        Raises ApiError: 404 for a name that is not known and for a target that is not in this revision, for which
        nobody else answers; 503 where it cannot be told whether the name is an alias.
        """
        adapters = self.serving_map.adapters
        if (targets := self.targets(model)) is not None:
            target = choose_target(model, targets, key)
            if target not in adapters:
                raise unknown_target(model, target)
            return adapters[target]
        if model == self.serving_map.base_name:
            return None
        if model not in adapters:
            if self.aliases is None:
                raise unavailable(
                    f"{model[:100]!r} is no adapter, and whether it is an alias cannot be told: aliases.json could not "
                    "be read; GET /ready has the reason"
                )
            raise unknown_model(model)
        return adapters[model]


def aliases_in_force(
    before: Aliases, read: Aliases, served: Mapping[str, ServedAdapter], coming: Mapping[str, ServedAdapter]
) -> Aliases:
    """Each alias as it was ``read``; but as it was ``before`` while an adapter that it sends requests to is not
    ``served`` yet and is in the revision that is ``coming``: who adds an adapter and sends requests to it in the next
    moment has none of them fail while the replicas load it."""

    def is_early(targets: Targets) -> bool:
        return any(weight > 0 and own not in served and own in coming for own, weight in targets.items())

    return {name: before[name] if name in before and is_early(targets) else targets for name, targets in read.items()}
