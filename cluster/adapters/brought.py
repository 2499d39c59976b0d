"""What training left beside an adapter's weights and answers otherwise than the base's own: another chat template, end
token, or tokens that were added. None of it is a reason to refuse; who serves the adapter should know of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.adapters.tensor_file import shorten
from cluster.errors import StoreConflict, StoreForbidden, StoreMissing
from cluster.store.protocol import Entry, Store

TOKENIZER_FILES = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "generation_config.json",
)
UNREADABLE = "unreadable"
MAX_TEMPLATE_SIZE = 64 << 10
# Of tokenizer.json this much is read, megabytes as it has: what was added stands before the vocabulary.
_READ_BYTES = 1 << 20
_ADDED = '"added_tokens"'


@dataclass(frozen=True)
class Tokenizing:
    """What a folder's tokenizer files say; None, or nothing, where they do not. ``end_ids``: token ids that end an
    answer; ``added``: text of each added token -> its id."""

    chat_template: str | None = None
    end_token: str | None = None
    end_ids: tuple[int, ...] | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        return self != Tokenizing()


@dataclass(frozen=True)
class Brought:
    """``notes``: what differs -> how, for people. ``chat_template`` is the adapter's own, where it differs and may be
    applied."""

    notes: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


def read_tokenizing(store: Store, entries: Iterable[Entry]) -> Tokenizing:
    """Of one folder's TOKENIZER_FILES. Raises StoreUnreachable; a file that cannot be read otherwise is named in
    ``unreadable``."""
    documents: dict[str, Any] = {}
    unreadable = []
    for entry in entries:
        name = entry.key.rpartition("/")[2]
        try:
            data = store.read_range(entry.key, 0, min(entry.size_bytes, _READ_BYTES))
            # Where it is cut, a character may be too.
            text = data.decode(errors="ignore" if len(data) < entry.size_bytes else "strict")
            documents[name] = _parsed(name, text)
        except (ValueError, RecursionError, StoreConflict, StoreForbidden, StoreMissing):
            unreadable.append(name)
    config, special = (_object(documents.get(n)) for n in ("tokenizer_config.json", "special_tokens_map.json"))
    generation = _object(documents.get("generation_config.json"))
    return Tokenizing(
        chat_template=documents.get("chat_template.jinja") or _template(config.get("chat_template")),
        end_token=_text(config.get("eos_token")) or _text(special.get("eos_token")),
        end_ids=_ids(generation.get("eos_token_id")),
        added={
            **_added_by_text(documents.get("added_tokens.json")),
            **_added_by_id(config.get("added_tokens_decoder")),
            **_added_listed(documents.get("tokenizer.json")),
        },
        unreadable=tuple(unreadable),
    )


def brought_along(own: Tokenizing, base: Tokenizing, vocabulary_size: int | None) -> Brought:
    """What of ``own`` the ``base`` has not; ``vocabulary_size``: the rows of its table of embeddings."""
    if not base.is_known:
        return Brought()
    notes, template = {}, None
    if own.chat_template is not None and own.chat_template.strip() != (base.chat_template or "").strip():
        told = "another chat template than the base's" if base.chat_template else "a chat template; the base has none"
        if len(own.chat_template.encode()) > MAX_TEMPLATE_SIZE:
            told += f", of more than {MAX_TEMPLATE_SIZE >> 10} KiB: it is not applied"
        else:
            template = own.chat_template
        notes["chat-template"] = told
    if own.end_token is not None and base.end_token is not None and own.end_token != base.end_token:
        notes["end-token"] = (
            f"it was trained to end with {shorten(own.end_token)}, the base ends with {base.end_token!r}"
        )
    elif own.end_ids is not None and base.end_ids is not None and own.end_ids != base.end_ids:
        notes["end-token"] = f"it was trained to end with token ids {own.end_ids}, the base ends with {base.end_ids}"
    if new := sorted((token_id, text) for text, token_id in own.added.items() if base.added.get(text) != token_id):
        token_id, text = new[-1]
        told = f"{len(new)} tokens that the base's tokenizer has not, such as {shorten(text)} (id {token_id}"
        beyond = vocabulary_size is not None and token_id >= vocabulary_size
        notes["added-tokens"] = told + (f", beyond the base's vocabulary of {vocabulary_size})" if beyond else ")")
    if own.unreadable:
        notes[UNREADABLE] = f"{', '.join(own.unreadable)} cannot be read, so what they say is not known"
    return Brought(notes, template)


def _parsed(name: str, text: str) -> Any:
    if name.endswith(".jinja"):
        return text
    if name != "tokenizer.json":
        return json.loads(text)
    start = text.find(_ADDED)
    if start < 0:
        return []
    return json.JSONDecoder().raw_decode(text[start + len(_ADDED) :].lstrip().removeprefix(":").lstrip())[0]


def _object(document: Any) -> dict[str, Any]:
    return document if isinstance(document, dict) else {}


def _text(token: Any) -> str | None:
    """A token is a text, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if _is_sound(token) else None


def _template(value: Any) -> str | None:
    """One, or several by name."""
    if isinstance(value, list):
        named = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
        value = named.get("default")
    return value if _is_sound(value) else None


def _is_sound(text: Any) -> bool:
    """JSON can hold halves of characters, which no manifest can."""
    return isinstance(text, str) and text != "" and not any("\ud800" <= c <= "\udfff" for c in text)


def _ids(value: Any) -> tuple[int, ...] | None:
    ids = value if isinstance(value, list) else [value]
    return tuple(sorted(ids)) if ids and all(type(i) is int for i in ids) else None


def _added_by_text(document: Any) -> dict[str, int]:
    return {text: i for text, i in _object(document).items() if type(i) is int}


def _added_by_id(document: Any) -> dict[str, int]:
    return {text: int(i) for i, token in _object(document).items() if (text := _text(token)) and i.isdecimal()}


def _added_listed(document: Any) -> dict[str, int]:
    tokens = document if isinstance(document, list) else []
    return {text: t["id"] for t in tokens if (text := _text(t)) and type(t.get("id")) is int}
