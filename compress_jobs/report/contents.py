"""What a bundle holds, as lines for people."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

from cluster.bundle.reading import Bundle
from cluster.errors import UnknownAdapter
from compress_jobs.report.brought import brought_lines
from compress_jobs.report.facts import gate_text
from compress_jobs.report.refusals import refusal_lines, remedy_lines


def show_bundle(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    method = manifest.method
    lines = [
        f"bundle    {manifest.bundle} revision {manifest.revision} at {bundle.store.uri}",
        f"base      {manifest.base.name} ({manifest.base.fingerprint[:19]}...)",
        f"method    {method.name}, rank {method.rank}, {method.dtype}, seed {method.seed}, gate {gate_text(method)}",
        f"modules   {len(manifest.modules)}",
        f"resident  {manifest.resident_bytes():,} bytes",
    ]
    for name, cluster in manifest.clusters.items():
        lines.append(f"cluster   {name}: {cluster.num_slots} adapters, {bundle.home_bytes(f'cluster:{name}'):,} bytes")
    ranks = Counter(adapter.rank for adapter in manifest.adapters.values() if adapter.rank is not None)
    for rank, number in sorted(ranks.items()):
        own = {adapter.factors for adapter in manifest.adapters.values() if adapter.rank == rank}
        size = sum(manifest.objects[str(factors)] for factors in own)
        lines.append(f"factors   rank {rank}: {number} adapters, {size:,} bytes")
    lines.append(f"{'adapter':<32} {'mode':<10} {'cluster':>7} {'error':>8} {'worst module':>13}  served")
    for adapter_id, adapter in sorted(manifest.adapters.items()):
        lines.append(
            f"{adapter_id:<32} {adapter.mode:<10} {adapter.cluster or '-':>7} {adapter.error:8.4f} "
            f"{adapter.error_worst_module:13.4f}  {adapter.served[7:19]}"
        )
    told = brought_lines(manifest) + refusal_lines(manifest.refused) + remedy_lines(manifest.refused, manifest.adapters)
    return lines + told


def show_adapter(bundle: Bundle, adapter_id: str) -> list[str]:
    """Raises UnknownAdapter, saying why where the job refused it."""
    manifest = bundle.manifest
    if adapter_id in manifest.refused:
        refused = manifest.refused[adapter_id]
        return [f"{adapter_id}: refused ({refused.reason}): {refused.message}"]
    if adapter_id not in manifest.adapters:
        raise UnknownAdapter(f"adapter {adapter_id!r} is not in {bundle.address}; `show` without --adapter lists them")
    known = {key: value for key, value in asdict(manifest.adapters[adapter_id]).items() if value not in (None, {})}
    return [json.dumps({"adapter": adapter_id, **known}, indent=2)]
