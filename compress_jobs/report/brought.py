"""What adapters brought along and the base has not: they may answer otherwise than in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from cluster.bundle.manifest import Manifest
from compress_jobs.report.page import Section, paragraph, table

_APPLIED = "The application answers their chats with it; with `adapter_chat_templates: false`, with the base's."


def brought_lines(manifest: Manifest) -> list[str]:
    """One line for people, where there is anything to tell."""
    kinds = Counter(kind for adapter in manifest.adapters.values() for kind in adapter.brought)
    if not kinds:
        return []
    count = sum(bool(adapter.brought) for adapter in manifest.adapters.values())
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items(), key=lambda k: (-k[1], k[0])))
    return [f"brought    {count} adapters came with what the base has not: {told}; `show --adapter ID` tells which"]


def brought(manifest: Manifest, report: Mapping[str, Any]) -> Section | None:
    rows = [
        (adapter_id, kind, message)
        for adapter_id, adapter in sorted(manifest.adapters.items())
        for kind, message in sorted(adapter.brought.items())
    ]
    if not rows:
        return None
    body = table(f"Brought along: {len(rows):,}", ("adapter", "what", "how it differs"), rows)
    if manifest.templates:
        body += paragraph(f"{len(manifest.templates)} chat templates are in the manifest. {_APPLIED}")
    body += paragraph("End tokens and added tokens are not applied: these adapters may end, or read, otherwise.")
    return Section("brought", "What adapters brought along", body)
