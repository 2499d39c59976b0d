"""The aliases as the store has them, looked at again and again."""

from __future__ import annotations

import logging

from cluster.bundle.aliases import Aliases, aliases_etag, read_aliases
from cluster.errors import BundleError, StoreError
from cluster.store.protocol import Store

logger = logging.getLogger("ray.serve")


class AliasReader:
    """``state``: "loaded", or why what is there now could not be read. The file is read where its ETag is another."""

    def __init__(self) -> None:
        self._aliases: Aliases | None = None
        self._etag: str | None = None
        self.state = "loaded"

    def look(self, store: Store) -> Aliases | None:
        """What is there; where that cannot be read, what was read before, None where nothing was. Raises nothing of
        the store's."""
        try:
            etag = aliases_etag(store)
            if self._aliases is None or etag != self._etag:
                if etag is None and self._aliases:
                    store.head("CURRENT")  # a folder or bucket that is gone has not been told to have no aliases
                self._aliases, self._etag = read_aliases(store)
                logger.info("%d aliases were read", len(self._aliases))
            self.state = "loaded"
        except (BundleError, StoreError) as error:
            if str(error) != self.state:
                logger.warning("aliases: %s", error)
            self.state = str(error)
        return self._aliases
