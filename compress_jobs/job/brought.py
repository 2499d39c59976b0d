"""What adapters brought along besides their weights, as the manifest keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.adapters.base import BaseModel
from cluster.adapters.record import AdapterFiles, AdapterRecord
from cluster.bundle.manifest import template_hash
from compress_jobs.progress import say


def brought_fields(record: AdapterRecord) -> dict[str, Any]:
    """Fields of the manifest's ``Adapter``."""
    template = record.brought.chat_template
    return {
        "brought": dict(record.brought.notes),
        "chat_template": None if template is None else template_hash(template),
    }


def say_untold(base: BaseModel, address: str, folders: Iterable[AdapterFiles]) -> None:
    if not base.tokenizing.is_known and any(files.beside for files in folders):
        say(f"no tokenizer in {address}: whether adapters brought another chat template or tokens is not told")


def templates_of(records: Iterable[AdapterRecord]) -> dict[str, str]:
    """Hash -> text, each once however many adapters brought it."""
    found = {record.brought.chat_template for record in records} - {None}
    return {template_hash(text): text for text in sorted(filter(None, found))}
