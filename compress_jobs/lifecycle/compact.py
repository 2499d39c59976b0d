"""``compact``: bases fitted anew for the adapters that are served, when those that stand have drifted from them."""

from __future__ import annotations

import fnmatch
import glob
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from cluster.adapters.layout import Layout
from cluster.adapters.listing import list_collection
from cluster.bundle.manifest import Adapter, Manifest
from cluster.bundle.removed import read_removed
from compress_jobs.job.options import RunOptions, matching
from compress_jobs.lifecycle.revision import Standing
from compress_jobs.lifecycle.source import need_known


@dataclass(frozen=True)
class Drift:
    """``alone`` and ``error`` as ``compact --help`` defines them, and what they are made of."""

    num_adapters: int
    num_alone: int
    fitted_share_alone: float
    num_added_on_basis: int
    fitted_error: float
    added_error: float
    alone: float
    error: float

    @property
    def figure(self) -> float:
        return max(self.alone, self.error)

    @staticmethod
    def of(manifest: Manifest) -> Drift:
        counted = [
            adapter
            for adapter_id, adapter in manifest.adapters.items()
            if not any(fnmatch.fnmatchcase(adapter_id, pattern) for pattern in manifest.method.raw)
        ]
        fitted = [adapter for adapter in counted if adapter.added is None]
        on_basis = [adapter for adapter in counted if adapter.mode == "core"]
        fitted_error = _mean(adapter.error for adapter in on_basis if adapter.added is None)
        added = [adapter.error for adapter in on_basis if adapter.added is not None]
        now = _mean(adapter.error for adapter in on_basis)
        rise = max(now / fitted_error - 1, 0.0) if fitted_error > 0 else (math.inf if added else 0.0)
        share, fitted_share = _share_alone(counted), _share_alone(fitted)
        return Drift(
            num_adapters=len(counted),
            num_alone=sum(adapter.mode != "core" for adapter in counted),
            fitted_share_alone=fitted_share,
            num_added_on_basis=len(added),
            fitted_error=fitted_error,
            added_error=_mean(added),
            alone=max(share - fitted_share, 0.0),
            error=rise,
        )

    def lines(self, level: float) -> list[str]:
        return [
            f"alone      {self.num_alone} of {self.num_adapters} adapters truncated or raw, "
            f"{self.fitted_share_alone:.1%} of the fitted: {self.alone:+.3f}",
            f"error      mean {self.fitted_error:.4f} of the fitted, {self.added_error:.4f} of "
            f"{self.num_added_on_basis} added on a basis: {self.error:+.3f}",
            f"drift      {self.figure:.3f}, level {level:g}",
        ]


def refit_options(
    standing: Standing,
    adapters: str,
    base: str,
    without: Collection[str] = (),
    accept_base: Collection[str] = (),
    num_cpus: int = 0,
    allow_missing: bool = False,
    allow_drop: str = "0",
    id_patterns: tuple[str, ...] = (),
) -> RunOptions:
    """Options of the run that fits the current revision's adapters anew, less ``without`` (ids and patterns).

    Raises ConfigError for what is to be left out and is neither served nor in the
    collection.
    """
    manifest, method = standing.manifest, standing.manifest.method
    layout = Layout(id_patterns or manifest.layout.id_patterns, manifest.layout.checkpoints)
    folders = {files.adapter_id for files in list_collection(adapters, layout, manifest.adapters).adapters}
    removed = read_removed(standing.store)
    known = folders | manifest.adapters.keys() | removed.keys()
    matched = [pattern for pattern in without if matching(known, (pattern,))]
    need_known(without, matched, "--without", f"neither served nor removed nor in {adapters}")
    asked = matching(known, without)
    kept = manifest.adapters.keys() - asked
    left_out = (folders - manifest.adapters.keys() - manifest.refused.keys()) | asked
    names = {*manifest.base.accepted, *accept_base}
    chosen: dict[str, Any] = {
        "clusters": method.clusters or 1,
        "rank": method.rank,
        "method": method.name,
        # What the job chose itself it chooses anew, for the adapters there are now.
        **dict.fromkeys(method.auto, "auto"),
    }
    if method.target_error is not None:
        chosen["target_error"] = method.target_error
    if method.isolation is not None:
        chosen["isolate"] = method.isolation
    return RunOptions(
        adapters=adapters,
        base=base,
        out=standing.store.uri,
        gate=method.gate,
        # A pattern that only meant who is left out would be refused, and would be a trace.
        raw=tuple(pattern for pattern in method.raw if fnmatch.filter(kept & folders, pattern)),
        seed=method.seed,
        dtype=method.dtype,
        base_name=manifest.base.name,
        accept_base=tuple(sorted(names - {""})),
        accept_unnamed_base="" in names,
        allow_missing=allow_missing,
        allow_drop=allow_drop,
        without=tuple(sorted(map(glob.escape, left_out))),  # ids, whatever a folder is called
        id_pattern=layout.id_patterns,
        checkpoints=layout.checkpoints,
        num_cpus=num_cpus,
        **chosen,
    )


def _share_alone(adapters: Collection[Adapter]) -> float:
    return sum(adapter.mode != "core" for adapter in adapters) / len(adapters) if adapters else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0
