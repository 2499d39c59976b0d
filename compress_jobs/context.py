"""What every step of one job needs to know; small, frozen, sent to each task."""

from __future__ import annotations

import hashlib
import resource
from dataclasses import dataclass

import torch

from cluster.base import BaseModel
from cluster.store import Store, open_store
from compress_jobs.options import RunOptions


@dataclass(frozen=True)
class JobContext:
    """``sampled`` are the modules whose factors are kept for clustering."""

    job_id: str
    options: RunOptions
    base: BaseModel
    sampled: tuple[str, ...]

    def adapters(self) -> Store:
        return open_store(self.options.adapters)

    def out(self) -> Store:
        return open_store(self.options.out)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    @property
    def work(self) -> str:
        return f"work/{self.job_id}/"

    def sample_key(self, adapter_id: str) -> str:
        return f"{self.work}samples/{adapter_id}.safetensors"

    def fit_key(self, layer: int, cluster: int) -> str:
        return f"{self.work}fits/{layer}-{cluster}.safetensors"

    def seed(self, *names: object) -> int:
        """A seed of its own for every named thing, the same on every run."""
        text = "/".join(map(str, (self.options.seed, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def peak_memory_bytes() -> int:
    """Most memory this process ever held (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
