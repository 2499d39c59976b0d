"""What every step of one job needs to know; small, frozen, sent to each task."""

from __future__ import annotations

import functools
import hashlib
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

from cluster.adapters.base import BaseModel
from cluster.adapters.record import AdapterFiles
from cluster.hashing import canonical_json
from cluster.store.address import open_store
from cluster.store.protocol import Store
from compress_jobs.job.options import RunOptions

# Part of every job's id: parts that were left by code with another idea of them are never picked up.
_PARTS_FORMAT = 5
# These change nothing of what is computed.
_INDIFFERENT = (
    "num_cpus",
    "in_flight",
    "task_memory",
    "out",
    "restore",
    "max_refused",
    "allow_missing",
    "allow_drop",
    "tasks",
)


@dataclass(frozen=True)
class JobContext:
    """``sampled`` are the modules whose factors are kept for clustering. ``options`` has nothing left to choose
    from the moment that the choice is made."""

    job_id: str
    options: RunOptions
    base: BaseModel
    sampled: tuple[str, ...]

    def adapters(self) -> Store:
        return _opened(self.options.adapters)

    def out(self) -> Store:
        return _opened(self.options.out)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    @property
    def work(self) -> str:
        return f"work/{self.job_id}/"

    @property
    def fits(self) -> str:
        """Where the parts lie that depend on the choice of method, clusters and rank."""
        return f"fits/{self.options.method}-{self.options.clusters}-{self.options.rank}/"

    def sample_key(self, adapter_id: str) -> str:
        return f"{self.work}samples/{adapter_id}.safetensors"

    def fit_key(self, layer: int, cluster: int) -> str:
        return f"{self.work}{self.fits}{layer}-{cluster}.safetensors"

    def seed(self, *names: object) -> int:
        """A seed of its own for every named thing, the same on every run."""
        text = "/".join(map(str, (self.options.seed, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


@functools.lru_cache(maxsize=4)
def _opened(uri: str) -> Store:
    """One client a process and store: to make one takes a tenth of a second and new connections."""
    return open_store(uri)


def job_id(options: RunOptions, base: BaseModel, folders: Sequence[AdapterFiles], rows: str | None) -> str:
    """The same for the same inputs and options, so that a job started again finds what it had done; another as
    soon as a file of the collection, an option, a held-out row (``rows`` is their hash), or torch is another."""
    asked = {name: value for name, value in asdict(options).items() if name not in _INDIFFERENT}
    names = sorted(base.accepted_names)
    model = [base.fingerprint, asdict(base.tokenizing), base.vocabulary_size]
    content = [_PARTS_FORMAT, torch.__version__, asked, rows, model, names, [asdict(f) for f in folders]]
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def peak_memory_bytes() -> int:
    """Most memory this process ever held (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
