"""What a collection would cost in several sizes, as ``plan`` tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cluster.adapters.base import BaseModel
from cluster.adapters.layout import Layout
from cluster.adapters.listing import list_collection
from cluster.adapters.record import AdapterFiles
from cluster.bundle.manifest import Method
from cluster.errors import ConfigError
from cluster.store.address import open_store
from cluster.units import gib
from compress_jobs.progress import say
from compress_jobs.quality.estimate import Row, Sampled, estimate, read_sample, standard_error
from compress_jobs.quality.planned_run import PlannedRun, plan_run

USABLE_SHARE = 0.9  # of a device's memory, as the application's placement counts it


@dataclass(frozen=True)
class Plan:
    """``usable_bytes`` of a device are for adapters, beside a copy of the base."""

    adapters: str
    folders: Sequence[AdapterFiles]
    base: BaseModel
    device_memory: int
    usable_bytes: int
    num_cpus: int
    sampled: Sampled
    rows: list[Row]
    run: PlannedRun | None = None

    @property
    def num_read(self) -> int:
        return len(self.sampled.records) + len(self.sampled.refused)

    @property
    def num_to_serve(self) -> int:
        return _to_serve(self.sampled, len(self.folders))

    @property
    def doubt(self) -> float:
        """One standard error of ``num_to_serve``."""
        if self.num_read == len(self.folders):
            return 0.0
        share = len(self.sampled.records) / self.num_read
        return standard_error(share, self.num_read, len(self.folders)) * len(self.folders)

    @property
    def bytes_now(self) -> int:
        return sum(files.weights.size_bytes for files in self.folders if files.weights)

    @property
    def inspect_seconds(self) -> float:
        return self.sampled.seconds / self.num_read * len(self.folders) / self.num_cpus

    def lines(self) -> list[str]:
        about = f" ± {self.doubt:.0f} (one standard error, from the sample)"
        if self.num_read == len(self.folders):
            about = ""
        return [
            f"adapters   {len(self.folders)} in {self.adapters}, {self.bytes_now:,} bytes",
            f"sample     {self.num_read} read whole; {len(self.sampled.refused)} of them refused",
            *(f"refused    {adapter_id} {message}" for adapter_id, message in sorted(self.sampled.refused.items())),
            f"to serve   {self.num_to_serve}{about}",
            f"device     {gib(self.device_memory)}, {gib(self.usable_bytes)} of it for adapters beside the base's "
            f"{gib(self.base.size_bytes)}",
            f"seconds    about {self.inspect_seconds:.0f} to read and inspect on {self.num_cpus} CPUs, then the last "
            "column",
            *([self.run.line()] if self.run else []),
            "error      mean squared, energy-weighted, ± one standard error; joint methods by a random balanced split",
            "",
            f"{'method':<8} {'clusters':>8} {'rank':>4} {'resident bytes':>16} {'own bytes/token':>16} {'error':>17} "
            f"{'adapters/device':>16} {'devices':>8} {'fit seconds':>12}",
            *map(_line, self.rows),
        ]

    def figures(self) -> dict[str, Any]:
        return {
            "adapters": len(self.folders),
            "sampled": self.num_read,
            "refused_in_sample": len(self.sampled.refused),
            "to_serve": self.num_to_serve,
            "to_serve_plus_minus": round(self.doubt, 1),
            "bytes_now": self.bytes_now,
            "inspect_seconds": round(self.inspect_seconds, 1),
            "run": asdict(self.run) if self.run else None,
            "choices": [asdict(row) for row in self.rows],
        }


def plan(
    adapters: str,
    base: BaseModel,
    device_memory: int,
    num_cpus: int,
    sample_size: int,
    seed: int,
    layout: Layout,
    method: Method | None = None,
) -> Plan:
    """Reads ``sample_size`` adapters of the collection at most; writes nothing. ``method``: the run to be told of
    besides. Raises ConfigError where the base fills the device, or no adapter can be accepted."""
    usable = int(USABLE_SHARE * device_memory) - base.size_bytes
    if usable <= 0:
        raise ConfigError(
            f"--device-memory {gib(device_memory)}: {USABLE_SHARE:.0%} of it does not hold the base's "
            f"{gib(base.size_bytes)}; give a larger device"
        )
    store = open_store(adapters)
    listing = list_collection(adapters, layout)
    folders = listing.adapters
    say(*listing.left_out_lines())
    torch.set_num_threads(1)  # as the job's tasks do, so that the seconds are a core's
    sampled = read_sample(store, folders, base, sample_size, seed)
    rows = estimate(sampled, base, _to_serve(sampled, len(folders)), usable, num_cpus, seed)
    run = None
    if method is not None:
        itemsize: int = getattr(torch, method.dtype).itemsize
        run = plan_run(sampled, base, _to_serve(sampled, len(folders)), usable, method, itemsize)
    return Plan(adapters, folders, base, device_memory, usable, num_cpus, sampled, rows, run)


def _to_serve(sampled: Sampled, num_folders: int) -> int:
    share = len(sampled.records) / (len(sampled.records) + len(sampled.refused))
    return max(1, round(num_folders * share))


def _line(row: Row) -> str:
    size = f"{row.method:<8} {row.clusters or '-':>8} {row.rank:>4} {row.size_bytes:>16,}"
    figures = f"{row.own_bytes_per_token:>16,} {row.error:8.4f} ± {row.plus_minus:6.4f}"
    return f"{size} {figures} {row.adapters_per_device:>16,} {row.devices:>8} {row.fit_seconds:>12.0f}"
