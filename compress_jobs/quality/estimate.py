"""What a collection would cost in several sizes, estimated from a sample of its adapters.

Everything is scaled up from adapters that were read whole, and the estimate's own error stands beside each
figure: the standard error over the sampled adapters, and how far the sampled modules miss the error over all
modules where that is known exactly (plain SVD).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.adapters.base import BaseModel
from cluster.adapters.factors import Factors
from cluster.adapters.reading import read_adapter
from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.compression.balanced import random_balanced
from cluster.compression.choose import CollectionShape, choose_svd
from cluster.compression.clustering import adapter_errors
from cluster.compression.sample import Sample, kind_energies, sample_modules
from cluster.compression.stack import stack_factors
from cluster.compression.svd import adapter_spectra
from cluster.compression.svd import spectra as squared_singular_values
from cluster.errors import AdapterRefused, ConfigError, StoreForbidden, StoreMissing
from cluster.store.protocol import Store
from compress_jobs.progress import track

# The paper's 1000 adapters in 25 clusters are 40 a cluster.
CLUSTER_SIZES = (40, 10)
RANKS = (8, 16, 32)
SVD_RANKS = (1, 2, 4, 8)
_ITEMSIZE = 2  # bfloat16

Errors = NDArray[np.float64]


@dataclass(frozen=True)
class Sampled:
    """The accepted adapters of the sample: records, spectra (module -> squared singular values), the sampled modules'
    factors; and what was refused of it. ``seconds`` is the time to read and measure all of them, on one core.
    ``exact``: whether bfloat16 holds an adapter's factors as they are."""

    records: list[AdapterRecord]
    spectra: list[dict[str, list[float]]]
    sample: Sample
    refused: dict[str, str]
    seconds: float
    exact: list[bool]


@dataclass(frozen=True)
class Row:
    """One size. ``own_bytes_per_token``: of the adapter's own that each of its tokens reads, besides what the batch
    shares. ``plus_minus``: one standard error of ``error``. ``adapters_per_device``: beside a copy of the base."""

    method: str
    clusters: int
    rank: int
    size_bytes: int
    own_bytes_per_token: int
    error: float
    plus_minus: float
    adapters_per_device: int
    devices: int
    fit_seconds: float


def read_sample(store: Store, folders: Sequence[AdapterFiles], base: BaseModel, size: int, seed: int) -> Sampled:
    """Raises ConfigError when none of the sample can be accepted."""
    rng = np.random.default_rng(seed)
    chosen = [folders[i] for i in sorted(rng.permutation(len(folders))[:size])]
    modules = set(sample_modules(list(base.modules)))
    records: list[AdapterRecord] = []
    spectra: list[dict[str, list[float]]] = []
    by_module: dict[str, list[tuple[int, Factors]]] = {}
    refused: dict[str, str] = {}
    exact: list[bool] = []
    began = time.monotonic()
    for files in track(chosen, len(chosen), "sample"):
        try:
            record, factors = read_adapter(store, files, base)
        except AdapterRefused as error:
            refused[files.adapter_id] = f"({error.reason}): {error.message}"
            continue
        except (StoreForbidden, StoreMissing) as error:
            refused[files.adapter_id] = f"(unreadable): {error}"
            continue
        # As the job does: where an adapter touches none of the sampled modules, some of its own stand for it.
        for module in modules.intersection(factors) or sample_modules(list(factors)):
            by_module.setdefault(module, []).append((len(records), factors[module]))
        records.append(record)
        spectra.append(adapter_spectra(factors))
        exact.append(all(torch.equal(t, t.bfloat16().float()) for pair in factors.values() for t in pair))
    seconds = time.monotonic() - began
    if not records:
        raise ConfigError(f"none of the {len(chosen)} sampled adapters can be accepted: {next(iter(refused.items()))}")
    stacks = {module: stack_factors(pairs) for module, pairs in sorted(by_module.items())}
    present = {module: stack for module, stack in stacks.items() if stack is not None}
    return Sampled(records, spectra, Sample.of(present, len(records), kind_energies(records)), refused, seconds, exact)


def estimate(
    sampled: Sampled, base: BaseModel, num_adapters: int, usable_bytes: int, num_cpus: int, seed: int
) -> list[Row]:
    """SVD at several ranks, then JD-Full in several sizes, for ``num_adapters`` like the sampled ones. (JD-Diag is left
    to the job: it takes many times as long to fit, and its cores save little beside the bases.)"""
    of_sample = CollectionShape.of(sampled.records, base.modules, _ITEMSIZE)
    shape = of_sample.repeated(num_adapters)
    touched = float(np.mean([len(record.modules) for record in sampled.records]))
    spectra = [list(modules.values()) for modules in sampled.spectra]
    doubt = _module_doubt(sampled)
    rows = []
    for choice in choose_svd(of_sample, spectra, 0.0):
        if choice.rank in SVD_RANKS:
            size = shape.svd_bytes(choice.rank)
            lost = np.array([tail(modules, choice.rank) for modules in spectra])
            own = size // num_adapters
            rows.append(_row("svd", 0, choice.rank, size, own, lost, 0.0, num_adapters, usable_bytes, seconds=0.0))
    rng = np.random.default_rng(seed)
    counts = sorted({1, *(math.ceil(num_adapters / size) for size in CLUSTER_SIZES)})
    for k in counts:
        for rank in RANKS:
            size = shape.joint_bytes(random_balanced(num_adapters, k, rng), rank, diagonal=False)
            own = int(rank * rank * _ITEMSIZE * touched)
            began = time.monotonic()
            lost, extrapolated = predict(sampled.sample, num_adapters / k, rank, seed)
            measured = sum(len(stack.members) for stack in sampled.sample.stacks)
            seconds = (time.monotonic() - began) / measured * num_adapters * touched / num_cpus
            rows.append(
                _row("jd-full", k, rank, size, own, lost, doubt, num_adapters, usable_bytes, seconds, extrapolated)
            )
    return rows


def predict(sample: Sample, cluster_size: float, rank: int, seed: int, method: str = "jd-full") -> tuple[Errors, float]:
    """Errors of the sampled adapters in clusters of about ``cluster_size``; and what of their mean is extrapolated,
    where the sample is smaller than one cluster: the error's growth from half the sample to all of it, carried on
    a doubling at a time."""
    n = sample.num_adapters
    labels = _labels(n, max(1, round(n / cluster_size)), seed)
    errors = adapter_errors(sample, labels, rank, seed, method)
    if n >= cluster_size or n < 4:
        return errors, 0.0
    at_half = adapter_errors(sample, _labels(n, 2, seed), rank, seed, method).mean()
    step = (errors.mean() - at_half) * math.log2(cluster_size / n)
    return errors, float(np.clip(step, 0.0, 1.0 - errors.mean()))


def _row(
    method: str,
    clusters: int,
    rank: int,
    size_bytes: int,
    own_bytes: int,
    errors: Errors,
    module_doubt: float,
    num_adapters: int,
    usable_bytes: int,
    seconds: float,
    extrapolated: float = 0.0,
) -> Row:
    mean = float(np.mean(errors))
    n = len(errors)
    spread = float(np.std(errors, ddof=1)) if n > 1 else mean
    of_adapters = spread / math.sqrt(n) * math.sqrt(max(0.0, 1 - n / num_adapters))
    # What is extrapolated may as well be half as much, or half as much again.
    doubt = math.sqrt(of_adapters**2 + (mean * module_doubt) ** 2 + (extrapolated / 2) ** 2)
    return Row(
        method=method,
        clusters=clusters,
        rank=rank,
        size_bytes=size_bytes,
        own_bytes_per_token=own_bytes,
        error=mean + extrapolated,
        plus_minus=doubt,
        adapters_per_device=int(usable_bytes / (size_bytes / num_adapters)),
        devices=max(1, math.ceil(size_bytes / usable_bytes)),
        fit_seconds=seconds,
    )


def _module_doubt(sampled: Sampled) -> float:
    """Relative miss of the sampled modules against all modules, for plain SVD of rank 2, where both are known."""
    everywhere = float(np.mean([tail(list(modules.values()), 2) for modules in sampled.spectra]))
    on_sample = np.zeros(sampled.sample.num_adapters)
    for m, stack in enumerate(sampled.sample.stacks):
        for spectrum, member in zip(squared_singular_values(stack), stack.members, strict=True):
            on_sample[member] += sampled.sample.weights[member, m] * tail([spectrum.tolist()], 2)
    return abs(float(on_sample.mean()) / everywhere - 1) if everywhere > 0 else 0.0


def tail(spectra: Sequence[Sequence[float] | Errors], rank: int) -> float:
    return math.fsum(math.fsum(s[rank:]) for s in spectra) / math.fsum(math.fsum(s) for s in spectra)


def _labels(n: int, k: int, seed: int) -> NDArray[np.int64]:
    return random_balanced(n, min(k, n), np.random.default_rng(seed))


def standard_error(share: float, n: int, of: int) -> float:
    """Of a share seen in ``n`` drawn without replacement, with one added on each side, for none seen is not none."""
    smoothed = (share * n + 1) / (n + 2)
    return math.sqrt(smoothed * (1 - smoothed) / n * (1 - n / of))
