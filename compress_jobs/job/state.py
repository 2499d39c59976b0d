"""State of one run, filled phase by phase."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.bundle.manifest import Refused
from cluster.compression.choose import Choice
from cluster.store.protocol import Store
from compress_jobs.job.assemble import AssembledCluster
from compress_jobs.job.cluster import Clustered
from compress_jobs.job.context import JobContext
from compress_jobs.job.fit import LayerFit
from compress_jobs.job.options import RunOptions
from compress_jobs.job.standalone import StandaloneAdapter


@dataclass(frozen=True)
class AdapterError:
    """The three figures of a manifest entry: energy-weighted over all modules, plain mean, worst module."""

    error: float
    unweighted: float
    worst_module: float

    @staticmethod
    def of(record: AdapterRecord, squared_errors: Mapping[str, float]) -> AdapterError:
        touched = {module: places.energy for module, places in record.modules.items() if places.energy > 0}
        relative = [squared_errors[module] / energy for module, energy in touched.items()]
        total = math.fsum(squared_errors[module] for module in touched) / math.fsum(touched.values())
        return AdapterError(total, math.fsum(relative) / len(relative), max(relative))


@dataclass
class Job:
    """Adapter indices count ``fitted``. ``asked``: the options as given; ``context.options`` has the choice in it."""

    context: JobContext
    asked: RunOptions
    store: Store
    folders: list[AdapterFiles]
    seen_current: str | None
    in_flight: int = 1
    records: dict[str, AdapterRecord] = field(default_factory=dict)
    records_read: dict[str, AdapterRecord] = field(default_factory=dict)
    spectra: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    refused: dict[str, Refused] = field(default_factory=dict)
    weighed: list[Choice] = field(default_factory=list)
    confirmed: dict[Choice, float] = field(default_factory=dict)
    fitted: list[str] = field(default_factory=list)
    clustered: Clustered | None = None
    layers: list[list[str]] = field(default_factory=list)
    fits: list[LayerFit] = field(default_factory=list)
    assembled: dict[int, AssembledCluster] = field(default_factory=dict)
    slots: dict[str, tuple[int, int]] = field(default_factory=dict)
    standalone: dict[str, StandaloneAdapter] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    num_bytes_read: int = 0

    @property
    def labels(self) -> NDArray[np.int64]:
        assert self.clustered is not None
        return np.asarray(self.clustered.labels)

    def basis_errors(self) -> dict[str, AdapterError]:
        """Of every fitted adapter on its basis, before the gate; those that changed during the job have none."""
        modules = {module: errors for fit in self.fits for module, errors in fit.squared_errors.items()}
        return {
            adapter_id: AdapterError.of(self.records[adapter_id], {m: errors[i] for m, errors in modules.items()})
            for i, adapter_id in enumerate(self.fitted)
            if adapter_id in self.records
        }

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
