"""The serving map in the router: loaded in the background, and what the router says until it is there."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from cluster.bundle.reading import Bundle
from cluster.bundle.serving_map import ServingMap
from cluster.errors import BundleError, StoreError
from serve_app.openai.errors import unavailable

RETRY_S = 5.0

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class LoadedMap:
    """The serving map and what the router says about it. ``model_ids`` are sorted, the base among them."""

    serving_map: ServingMap
    base_fingerprint: str
    model_ids: tuple[str, ...]
    loaded_at: int


class MapLoader:
    """``loaded`` is None, for the reason in ``state``, until ``load`` has succeeded."""

    def __init__(self, bundle: str, revision: int, adapter_chat_templates: bool) -> None:
        self._bundle, self._revision, self._adapter_templates = bundle, revision, adapter_chat_templates
        self.loaded: LoadedMap | None = None
        self.state = "it is being loaded"

    async def load(self) -> None:
        """Tries until the map is there."""
        while self.loaded is None:
            try:
                bundle = await asyncio.to_thread(Bundle.open, self._bundle, self._revision)
            except (BundleError, StoreError) as error:
                logger.warning("serving map: %s", error)
                self.state = str(error)
                await asyncio.sleep(RETRY_S)
            else:
                serving_map = bundle.serving_map
                if not self._adapter_templates:
                    serving_map = serving_map.with_the_bases_template()
                ids = tuple(sorted({serving_map.base_name, *serving_map.adapters}))
                self.loaded = LoadedMap(serving_map, bundle.manifest.base.fingerprint, ids, int(time.time()))
                self.state = "loaded"

    def get(self) -> LoadedMap:
        """Raises ApiError (503) before the map is there."""
        if self.loaded is None:
            raise unavailable(f"No serving map yet: {self.state}")
        return self.loaded
