"""A whole collection in memory, compressed without publishing: for measuring what a choice would do.

Legend as in cluster/compression/stack.py. Holds every factor of every adapter at once: for collections of evaluation's
size. What is published comes from ``run``, which holds a layer at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cluster.adapters.base import BaseModel
from cluster.adapters.factors import Factors, factored_energy
from cluster.adapters.layout import Layout
from cluster.adapters.listing import list_collection
from cluster.adapters.reading import read_adapter
from cluster.compression.balanced import Labels
from cluster.compression.clustering import assign
from cluster.compression.methods import JointMethod
from cluster.compression.sample import Sample, sample_modules
from cluster.compression.stack import FactorStack, stack_factors
from cluster.compression.svd import components_at_equal_bytes, spectra, truncate
from cluster.errors import AdapterRefused, ConfigError
from cluster.store.address import open_store
from compress_jobs.progress import say

Adapters = Mapping[str, Mapping[str, Factors]]
"""Adapter id -> module -> its factors there."""

DTYPE = torch.bfloat16  # what ``run`` stores by default


@dataclass(frozen=True)
class Collection:
    """``stacks``: module -> the adapters that touch it; their ``members`` count ``adapters``."""

    adapters: Adapters
    stacks: dict[str, FactorStack]

    @staticmethod
    def of(adapters: Adapters, modules: Iterable[str]) -> Collection:
        """``modules``: in the model's order."""
        stacks = {}
        for module in modules:
            stack = stack_factors([(i, own[module]) for i, own in enumerate(adapters.values()) if module in own])
            if stack is not None:
                stacks[module] = stack
        return Collection(adapters, stacks)

    @property
    def size_bytes(self) -> int:
        """Of the uncompressed factors, in the dtype they would be stored in."""
        return sum((A.numel() + B.numel()) * DTYPE.itemsize for own in self.adapters.values() for A, B in own.values())

    def labels(self, num_clusters: int, rank: int, seed: int) -> Labels:
        """As ``run`` clusters: on a few modules of every kind."""
        if num_clusters == 1:
            return np.zeros(len(self.adapters), dtype=np.int64)
        sampled = {module: self.stacks[module] for module in sample_modules(list(self.stacks))}
        return assign(Sample.of(sampled, len(self.adapters)), num_clusters, rank, seed).labels


@dataclass(frozen=True)
class Compressed:
    """``factors`` are what would be served, in float32 after rounding to the stored dtype; ``errors``:
    sum ||M - M^||^2 / sum ||M||^2 over an adapter's modules, of exactly these."""

    size_bytes: int
    factors: Adapters
    errors: dict[str, float]


def read_collection(address: str, base: BaseModel, layout: Layout) -> Collection:
    """Every adapter that can be accepted; the others are named on stderr. Raises ConfigError when there is none."""
    store = open_store(address)
    adapters: dict[str, dict[str, Factors]] = {}
    listing = list_collection(address, layout)
    say(*listing.left_out_lines())
    for files in listing.adapters:
        try:
            record, factors = read_adapter(store, files, base)
        except AdapterRefused as refused:
            say(str(refused))
            continue
        adapters[files.adapter_id] = {module: factors[module] for module in factors if record.modules[module].energy}
    if not adapters:
        raise ConfigError(f"--adapters {address}: no adapter there that can be accepted")
    return Collection.of(adapters, base.modules)


def compress_jointly(collection: Collection, labels: Labels, method: JointMethod, rank: int, seed: int) -> Compressed:
    """Every cluster on a basis of its own, bases and cores rounded as they would be stored, no gate."""
    ids = list(collection.adapters)
    factors: dict[str, dict[str, Factors]] = {adapter_id: {} for adapter_id in ids}
    num_members = np.bincount(labels)
    num_elements = 0
    for module, stack in collection.stacks.items():
        for cluster in np.unique(labels):
            positions = [i for i, member in enumerate(stack.members) if labels[member] == cluster]
            if not positions:
                continue
            own = stack.select(positions)
            basis = method.fit(own, rank, seed).rounded(DTYPE)
            unit = method.cores(own, basis)
            norms = own.norms.float().view(-1, *[1] * (unit.dim() - 1))
            cores = (unit * norms).to(DTYPE)
            # A core for every member, as stored: zeros where it does not touch the module.
            num_elements += basis.U.numel() + basis.V.numel() + int(num_members[cluster]) * cores[0].numel()
            for member, core in zip(own.members, cores.float(), strict=True):
                B = basis.U * core if core.dim() == 1 else basis.U @ core
                factors[ids[member]][module] = (basis.V.T, B)
    return Compressed(num_elements * DTYPE.itemsize, factors, errors_of(collection.adapters, factors))


def truncate_to_rank(adapters: Adapters, rank: int) -> Compressed:
    """Every adapter by plain SVD, to one rank at every module."""
    return _truncated(adapters, {(i, m): rank for i, modules in adapters.items() for m in modules}, DTYPE)


def truncate_to_bytes(adapters: Adapters, budget_bytes: int, dtype: torch.dtype = DTYPE) -> Compressed:
    """Every adapter by plain SVD, all together in ``budget_bytes``, spent where they lower the mean error most."""
    component_bytes: dict[str, int] = {}
    by_adapter: dict[str, dict[str, np.ndarray]] = {}
    for adapter_id, modules in adapters.items():
        by_adapter[adapter_id] = {}
        for module, (A, B) in modules.items():
            stack = stack_factors([(0, (A, B))])
            if stack is not None:
                by_adapter[adapter_id][module] = spectra(stack)[0]
                component_bytes[module] = (A.shape[1] + B.shape[0]) * dtype.itemsize
    return _truncated(adapters, components_at_equal_bytes(by_adapter, component_bytes, budget_bytes), dtype)


def errors_of(originals: Adapters, served: Adapters) -> dict[str, float]:
    """sum_m ||M - M^||^2 / sum_m ||M||^2 of every adapter, in factored form and float64; M^ = 0 where missing."""
    errors = {}
    for adapter_id, modules in originals.items():
        total = math.fsum(factored_energy(A, B) for A, B in modules.values())
        lost = []
        for module, (A, B) in modules.items():
            if module in served[adapter_id]:
                served_A, served_B = served[adapter_id][module]
                A, B = torch.cat([A, served_A]), torch.cat([B, -served_B], dim=1)
            lost.append(factored_energy(A, B))
        errors[adapter_id] = math.fsum(lost) / total
    return errors


def _truncated(adapters: Adapters, ranks: Mapping[tuple[str, str], int], dtype: torch.dtype) -> Compressed:
    factors: dict[str, dict[str, Factors]] = {adapter_id: {} for adapter_id in adapters}
    num_elements = 0
    for (adapter_id, module), rank in ranks.items():
        if rank:
            A, B = (t.to(dtype) for t in truncate(*adapters[adapter_id][module], rank))
            factors[adapter_id][module] = (A.float(), B.float())
            num_elements += A.numel() + B.numel()
    return Compressed(num_elements * dtype.itemsize, factors, errors_of(adapters, factors))
