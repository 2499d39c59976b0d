"""The serving map in the router: of the revision that is served, and what follows when CURRENT or an alias moves."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.bundle.aliases import Aliases, alias_faults
from cluster.bundle.reading import Bundle, current_revision, pinned_bundle, standing_revision
from cluster.errors import BundleError, StoreError
from cluster.store.protocol import Store
from serve_app.openai.errors import unavailable
from serve_app.placement import homes_by_group
from serve_app.routing.alias_reader import AliasReader
from serve_app.routing.following import ReplicaStatus, choose_revision, why_not
from serve_app.routing.loaded_map import LoadedMap, aliases_in_force

logger = logging.getLogger("ray.serve")


class MapFollower:
    """``served`` is None, for the reason in ``state``, until a map has been loaded.

    ``follows`` false: the revision stays the one it began with; aliases are followed all the same, for they are no part
    of it. ``unread``: why CURRENT, or what it names, could not be read when it was looked at last. ``converged_s``: how
    long the last switch took, from when CURRENT was seen to have moved.
    """

    def __init__(
        self,
        bundle: str,
        revision: int,
        homes: Mapping[str, tuple[str, ...]],
        adapter_chat_templates: bool,
        interval_s: float,
        follows: bool,
    ) -> None:
        self._bundle, self._first, self._homes = bundle, revision, homes
        self._adapter_templates, self._interval_s, self._follows = adapter_chat_templates, interval_s, follows
        self._maps: dict[int, LoadedMap] = {}
        self._seen_at = time.monotonic()
        self.served: LoadedMap | None = None
        self.wanted: int | None = None
        self.state = "it is being loaded"
        self._changes = asyncio.Condition()
        self._place: tuple[Store, str] | None = None
        self.unread = ""
        self.converged_s: float | None = None
        self.alias_reader = AliasReader()
        self._aliases: Aliases | None = None

    async def run(self) -> None:
        """Looks at the aliases and at CURRENT, for ever."""
        while True:
            # In this order: CURRENT's revision has what an alias was pointed at.
            read = await asyncio.to_thread(self._read_aliases)
            await self._look()
            self._aliases = read
            if self.served is not None:
                self.served = self._with_aliases(self.served)
            # Spread, so that a thousand routers do not ask at once.
            await asyncio.sleep(self._interval_s * random.uniform(0.8, 1.0))

    def _read_aliases(self) -> Aliases | None:
        return self.alias_reader.look(self._opened()[0])

    def _with_aliases(self, loaded: LoadedMap) -> LoadedMap:
        """``loaded``, which is served from now on, with the aliases that are in force then."""
        aliases, before = self._aliases, self.served.aliases if self.served else None
        coming = self._maps.get(self.wanted) if self.wanted is not None else None
        if aliases and before and coming is not None:
            aliases = aliases_in_force(before, aliases, loaded.serving_map.adapters, coming.serving_map.adapters)
        return loaded if aliases == loaded.aliases else replace(loaded, aliases=aliases)

    async def _look(self) -> None:
        try:
            number = await asyncio.to_thread(self._find_wanted)
            if number not in self._maps:
                self._maps[number] = await asyncio.to_thread(self._load, number)
        except (BundleError, StoreError) as error:
            if str(error) != self.unread:
                logger.warning("serving map: %s", error)
            self.unread = str(error)
            return
        self.unread = ""
        if number != self.wanted:
            logger.info("revision %s of %s is wanted", number, self._bundle)
            self.wanted, self._seen_at = number, time.monotonic()
            kept = (number, self.served.revision if self.served else number)
            self._maps = {own: loaded for own, loaded in self._maps.items() if own in kept}
            await self._tell()

    def _find_wanted(self) -> int:
        """CURRENT's; where that says nothing of this bundle, what was wanted before."""
        if not self._follows:
            return self._first
        if self.wanted is None:
            return standing_revision(*self._opened())
        found = current_revision(*self._opened())
        return self.wanted if found is None else found

    def _opened(self) -> tuple[Store, str]:
        if self._place is None:
            self._place = pinned_bundle(self._bundle)
        return self._place

    async def changed(self) -> None:
        """Returns when another revision is wanted, or served."""
        async with self._changes:
            await self._changes.wait()

    async def _tell(self) -> None:
        async with self._changes:
            self._changes.notify_all()

    async def consider(self, replicas: Sequence[ReplicaStatus], all_at_zero: bool = False) -> None:
        """Serve what the replicas are ready for. ``replicas``: all that are known, of all groups."""
        if self.wanted is None:
            return
        serving = self.served.revision if self.served else None
        chosen = choose_revision(self.wanted, serving, replicas, all_at_zero)
        if chosen != self.wanted:
            self._say(why_not(self.wanted, replicas))
        if chosen == serving:
            if chosen == self.wanted:
                self.state = "loaded"
            return
        try:
            if chosen not in self._maps:
                self._maps[chosen] = await asyncio.to_thread(self._load, chosen)
        except (BundleError, StoreError) as error:
            self._say(str(error))
            return
        self.served = self._with_aliases(self._maps[chosen])
        self._maps = {number: own for number, own in self._maps.items() if number in (chosen, self.wanted)}
        self.converged_s = time.monotonic() - self._seen_at
        if chosen == self.wanted:
            self.state = "loaded"
        logger.info("revision %s is served, was %s; it took %.1f s", chosen, serving, self.converged_s)
        await self._tell()

    def alias_faults(self) -> dict[str, str]:
        """Alias -> why it does not do what aliases.json says, of those for which that is so."""
        if self.served is None or not self._aliases:
            return {}
        serving_map, in_force = self.served.serving_map, self.served.aliases or {}
        early = {
            i: f"as before, until revision {self.wanted} is served"
            for i, t in self._aliases.items()
            if in_force.get(i) != t
        }
        return early | alias_faults(in_force, serving_map.base_name, serving_map.adapters)

    def get(self) -> LoadedMap:
        """Raises ApiError (503) before a map is there."""
        if self.served is None:
            raise unavailable(f"No serving map yet: {self.unread or self.state}")
        return self.served

    def _load(self, number: int) -> LoadedMap:
        bundle = Bundle.open(self._bundle, number)
        serving_map = bundle.serving_map
        if not self._adapter_templates:
            serving_map = serving_map.with_the_bases_template()
        groups = {home: group for group, own in homes_by_group(self._homes, serving_map).items() for home in own}
        return LoadedMap(number, serving_map, bundle.manifest.base.fingerprint, groups, int(time.time()))

    def _say(self, state: str) -> None:
        if state != self.state:
            logger.warning("serving map: %s", state)
        self.state = state
