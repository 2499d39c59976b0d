"""The gate: who is served on a basis, and who stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.adapters.record import AdapterRecord
from compress_jobs.job.adapter_error import AdapterError
from compress_jobs.job.fit import Fitted


@dataclass(frozen=True)
class Grades:
    """``on_basis``: cluster -> its adapters, whose positions there become slots; ``alone``: all others, to be truncated
    or served whole."""

    on_basis: dict[int, list[str]]
    alone: list[str]


def grade(
    fitted: Fitted, errors: Mapping[str, AdapterError], records: Mapping[str, AdapterRecord], gate: float
) -> Grades:
    """On a basis: whose error there is at most ``gate``. ``records``: the adapters to be served; ``errors``: of those
    that were fitted."""
    on_basis: dict[int, list[str]] = {}
    for adapter_id, cluster in zip(fitted.adapter_ids, fitted.labels, strict=True):
        if adapter_id in errors and errors[adapter_id].error <= gate:
            on_basis.setdefault(cluster, []).append(adapter_id)
    served_there = {adapter_id for kept in on_basis.values() for adapter_id in kept}
    never_fitted = [adapter_id for adapter_id in records if adapter_id not in errors]
    return Grades(on_basis, [adapter_id for adapter_id in (*errors, *never_fitted) if adapter_id not in served_there])
