"""The gate: who is served on a basis, and who stands alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.adapters.record import AdapterRecord
from cluster.compression.svd import smallest_rank
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.choose import Chosen, collection_shape
from compress_jobs.job.fit import Fitted
from compress_jobs.job.inspect import Collection


@dataclass(frozen=True)
class Grades:
    """``on_basis``: cluster -> its adapters, whose positions there become slots; ``alone``: all others, to be truncated
    or served whole. ``dissolved``: those among them that met the gate, on a basis too dear for the few left on it."""

    on_basis: dict[int, list[str]]
    alone: list[str]
    dissolved: list[str] = field(default_factory=list)


def grade(
    chosen: Chosen, fitted: Fitted, errors: Mapping[str, AdapterError], collection: Collection, gate: float
) -> Grades:
    """On a basis: whose error there is at most ``gate``, unless the gate has left fewer than half of its members there
    and they take fewer bytes truncated, within the gate as well. (Where most stay, bases are what was asked for: they
    also spare each token the reading of an adapter's own factors.)

    ``collection``: the adapters to be served; ``errors``: of those that were fitted.
    """
    members: dict[int, list[str]] = {}
    for adapter_id, cluster in zip(fitted.adapter_ids, fitted.labels, strict=True):
        members.setdefault(cluster, []).append(adapter_id)
    on_basis: dict[int, list[str]] = {}
    dissolved: list[str] = []
    for cluster, fitted_there in members.items():
        kept = [i for i in fitted_there if i in errors and errors[i].error <= gate]
        if 2 * len(kept) < len(fitted_there) and _is_too_dear(chosen, fitted_there, kept, collection, gate):
            dissolved += kept
        elif kept:
            on_basis[cluster] = kept
    served_there = {adapter_id for kept in on_basis.values() for adapter_id in kept}
    never_fitted = [adapter_id for adapter_id in collection.records if adapter_id not in errors]
    alone = [adapter_id for adapter_id in (*errors, *never_fitted) if adapter_id not in served_there]
    return Grades(on_basis, alone, dissolved)


def _is_too_dear(
    chosen: Chosen, members: Sequence[str], kept: Sequence[str], collection: Collection, gate: float
) -> bool:
    options = chosen.context.options
    shape = collection_shape(chosen.context, [chosen.records[adapter_id] for adapter_id in members])
    on_basis = shape.cluster_bytes(int(options.rank), options.method == "jd-diag", len(kept))
    truncated = sum(_truncated_bytes(chosen, collection, adapter_id, gate) for adapter_id in kept)
    return truncated < on_basis


def _truncated_bytes(chosen: Chosen, collection: Collection, adapter_id: str, gate: float) -> int:
    record: AdapterRecord = collection.records[adapter_id]
    rank, _ = smallest_rank([np.asarray(values) for values in collection.spectra[adapter_id].values()], gate)
    return collection_shape(chosen.context, [record]).svd_bytes(rank)
