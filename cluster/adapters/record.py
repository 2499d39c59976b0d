"""What is known of an adapter: first from the listing of its folder, then from one reading of its files."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.adapters.brought import Brought
from cluster.adapters.tensor_file import TensorPlace
from cluster.store.protocol import Entry


@dataclass(frozen=True)
class AdapterFiles:
    """What the listing says of an adapter's folder. ``others``: names of further files that hold weights, none of which
    is read. ``beside``: files of its tokenizer. ``twins``: the folders, where several have this id, and so none."""

    adapter_id: str
    config: Entry | None = None
    weights: Entry | None = None
    others: tuple[str, ...] = ()
    beside: tuple[Entry, ...] = ()
    twins: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModulePlaces:
    """Where one module's factors lie in the weights file, and ``energy`` = ||B A||_F^2 with the scale in B."""

    A: TensorPlace
    B: TensorPlace
    scale: float
    energy: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True)
class AdapterRecord:
    """An accepted adapter: enough to read any of its modules again. ``version`` identifies the source."""

    adapter_id: str
    key: str
    version: str
    etag: str
    size_bytes: int
    modules: dict[str, ModulePlaces]
    brought: Brought = field(default_factory=Brought)

    @property
    def energy(self) -> float:
        return math.fsum(places.energy for places in self.modules.values())
