"""Quality of a published bundle on held-out rows: base, uncompressed, as served, and SVD at equal bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from cluster.adapters.base import read_base
from cluster.adapters.factors import Factors
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import read_adapter
from cluster.bundle.export import served_factors
from cluster.bundle.reading import Bundle
from cluster.errors import AdapterRefused, ConfigError
from cluster.store.address import open_store
from compress_jobs.progress import say
from compress_jobs.quality.collection import truncate_to_bytes
from compress_jobs.quality.examiner import Examiner
from compress_jobs.quality.metrics import Score
from compress_jobs.quality.scorer import Scorer, Task

VARIANTS = ("base", "uncompressed", "served", "svd_equal_bytes")


def evaluate(
    bundle: Bundle, base: str, adapters: str, tasks: Mapping[str, Task], accept_base: Collection[str] = ()
) -> tuple[Examiner, dict[str, dict[str, Score]]]:
    """Variant -> adapter id -> score, for every served adapter that has a task; and the examiner, which knows what
    they are relative to. ``base`` is a local folder; ``accept_base`` are further names that adapters may call it by."""
    originals = _read_originals(bundle, base, adapters, accept_base)
    dtype = getattr(torch, bundle.manifest.method.dtype)
    truncated = truncate_to_bytes(originals, bundle.manifest.resident_bytes(), dtype)
    examiner = Examiner(Scorer(base), originals, tasks)
    served = {adapter_id: served_factors(bundle, adapter_id) for adapter_id in examiner.base}
    scores = {"base": examiner.base, "uncompressed": examiner.uncompressed}
    for variant, factors in (("served", served), ("svd_equal_bytes", truncated.factors)):
        say(f"evaluate: {variant}")
        scores[variant] = examiner.examine(factors)
    return examiner, scores


def _read_originals(
    bundle: Bundle, base: str, adapters: str, accept_base: Collection[str]
) -> dict[str, dict[str, Factors]]:
    manifest = bundle.manifest
    described = read_base(base, name=manifest.base.name, accept=accept_base)
    if described.fingerprint != manifest.base.fingerprint:
        raise ConfigError(f"--base {base}: another model than the bundle's base {manifest.base.name}; give that one")
    store = open_store(adapters)
    originals = {}
    for files in list_adapters(store):
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
