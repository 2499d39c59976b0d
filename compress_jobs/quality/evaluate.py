"""Quality of a published bundle on held-out rows: base, uncompressed, as served, and SVD at equal bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cluster.adapters.base import read_base
from cluster.adapters.factors import Factors
from cluster.adapters.listing import list_collection
from cluster.adapters.reading import read_adapter
from cluster.bundle.export import served_factors
from cluster.bundle.reading import Bundle
from cluster.errors import AdapterRefused, ConfigError
from cluster.store.address import open_store
from compress_jobs.progress import say
from compress_jobs.quality.collection import truncate_to_bytes
from compress_jobs.quality.examiner import Examiner
from compress_jobs.quality.metrics import METRICS, Figure, Score, as_json, figures
from compress_jobs.quality.scorer import Scorer
from compress_jobs.quality.task import Task

VARIANTS = ("base", "uncompressed", "served", "svd_equal_bytes")


@dataclass(frozen=True)
class Evaluation:
    """``scores``: variant -> adapter id -> score, of every served adapter that has a task; ``examiner`` knows what they
    are relative to."""

    examiner: Examiner
    scores: dict[str, dict[str, Score]]

    def lines(self) -> list[str]:
        lines = [f"{'loss exact Rouge-L agree':<24}" + "".join(f"{variant:>28}" for variant in VARIANTS)]
        for adapter_id in self.examiner.base:
            rows = (self.scores[variant][adapter_id] for variant in VARIANTS)
            cells = "".join(_cell([getattr(row, metric) for metric in METRICS]) for row in rows)
            lines.append(f"{adapter_id:<24}{cells}")
        for title, found in (("", self._absolute()), ("relative ", self._relative())):
            for what in ("mean", "worst", "spread"):
                columns = ([getattr(figure, what, None) for figure in found[variant].values()] for variant in VARIANTS)
                lines.append(f"{title + what:<24}" + "".join(map(_cell, columns)))
        return lines

    def figures(self) -> dict[str, Any]:
        """Variant -> its means, and all figures over the adapters, absolute and relative."""
        absolute, relative = self._absolute(), self._relative()
        result: dict[str, Any] = {}
        for variant in VARIANTS:
            result[variant] = {metric: figure.mean for metric, figure in absolute[variant].items() if figure}
            for key, found in (("over_adapters", absolute), ("relative", relative)):
                result[variant][key] = {metric: as_json(figure) for metric, figure in found[variant].items()}
        return result

    def _absolute(self) -> dict[str, dict[str, Figure | None]]:
        return {variant: figures(list(self.scores[variant].values())) for variant in VARIANTS}

    def _relative(self) -> dict[str, dict[str, Figure | None]]:
        relative = self.examiner.relative
        return {variant: figures(list(relative(self.scores[variant]).values())) for variant in VARIANTS}


def evaluate(
    bundle: Bundle, base: str, adapters: str, tasks: Mapping[str, Task], accept_base: Collection[str] = ()
) -> Evaluation:
    """``base`` is a local folder; ``accept_base`` are further names that adapters may call it by."""
    originals = _read_originals(bundle, base, adapters, accept_base)
    dtype = getattr(torch, bundle.manifest.method.dtype)
    truncated = truncate_to_bytes(originals, bundle.manifest.resident_bytes(), dtype)
    examiner = Examiner(Scorer(base), originals, tasks)
    served = {adapter_id: served_factors(bundle, adapter_id) for adapter_id in examiner.base}
    scores = {"base": examiner.base, "uncompressed": examiner.uncompressed}
    for variant, factors in (("served", served), ("svd_equal_bytes", truncated.factors)):
        say(f"evaluate: {variant}")
        scores[variant] = examiner.examine(factors)
    return Evaluation(examiner, scores)


def _cell(values: Sequence[float | None]) -> str:
    return f"{' '.join('    -' if value is None else f'{value:5.3f}' for value in values):>28}"


def _read_originals(
    bundle: Bundle, base: str, adapters: str, accept_base: Collection[str]
) -> dict[str, dict[str, Factors]]:
    manifest = bundle.manifest
    described = read_base(base, name=manifest.base.name, accept=(*manifest.base.accepted, *accept_base))
    if described.fingerprint != manifest.base.fingerprint:
        raise ConfigError(f"--base {base}: another model than the bundle's base {manifest.base.name}; give that one")
    store = open_store(adapters)
    originals = {}
    for files in list_collection(adapters, manifest.layout, manifest.adapters).adapters:
        if files.adapter_id in manifest.adapters:
            try:
                record, factors = read_adapter(store, files, described)
            except AdapterRefused as refused:
                if refused.reason != "base":
                    raise
                raise ConfigError(f"{refused}") from None
            if record.version != manifest.adapters[files.adapter_id].version:
                raise ConfigError(
                    f"adapter {files.adapter_id} in {adapters} is not the version in the bundle; compress again"
                )
            originals[files.adapter_id] = factors
    if missing := sorted(set(manifest.adapters) - set(originals)):
        raise ConfigError(
            f"--adapters {adapters}: {missing[0]} is in the bundle but not there; give the job's collection"
        )
    return originals
