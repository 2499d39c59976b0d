"""What training left beside an adapter's weights and answers otherwise than the base's own: another chat template, end
token, or tokens that were added. None of it is a reason to refuse; who serves the adapter should know of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.adapters.mistaken import mistaken_for
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
_MOST_ENDS = 32


@dataclass(frozen=True)
class Tokenizing:
    """What a folder's tokenizer files say; None, or nothing, where they do not. ``end_ids``: token ids that end an
    answer; ``added``: text of each added token -> its id; ``unreadable``: files that cannot be understood."""

    chat_template: str | None = None
    end_token: str | None = None
    end_ids: tuple[int, ...] | None = None
    added: Mapping[str, int] = field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        return replace(self, unreadable=()) != Tokenizing()


@dataclass(frozen=True)
class Brought:
    """``notes``: what differs -> how, for people. ``chat_template`` is the adapter's own, where it differs and may be
    applied."""

    notes: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None


def read_tokenizing(store: Store, entries: Iterable[Entry]) -> Tokenizing:
    """Of one folder's TOKENIZER_FILES. Raises StoreUnreachable; a file that cannot be read or understood is named in
    ``unreadable``."""
    said: dict[str, Tokenizing] = {}
    unreadable = []
    for entry in entries:
        name = entry.key.rpartition("/")[2]
        try:
            data = store.read_range(entry.key, 0, min(entry.size_bytes, _READ_BYTES))
            # Where it is cut, a character may be too.
            text = data.decode(errors="ignore" if len(data) < entry.size_bytes else "strict")
            if mistaken_for(data) is not None:
                raise ValueError("something else")
            said[name] = _READERS[name](text)
        except (
            ValueError,
            TypeError,
            AttributeError,
            LookupError,
            RecursionError,
            StoreConflict,
            StoreForbidden,
            StoreMissing,
        ):
            unreadable.append(name)

    def first(what: str) -> Any:
        found = (getattr(said[name], what) for name in TOKENIZER_FILES if name in said)
        return next((value for value in found if value is not None), None)

    added = {text: i for name in reversed(TOKENIZER_FILES) if name in said for text, i in said[name].added.items()}
    return Tokenizing(first("chat_template"), first("end_token"), first("end_ids"), added, tuple(unreadable))


def brought_along(own: Tokenizing, base: Tokenizing, vocabulary_size: int | None) -> Brought:
    """What of ``own`` the ``base`` has not; ``vocabulary_size``: the rows of its table of embeddings."""
    if not base.is_known:
        return Brought()
    notes, template = {}, None
    if own.chat_template is not None and _plain(own.chat_template) != _plain(base.chat_template):
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
    # A base that tells of none has a tokenizer.json that is missing or no such file: nothing to compare with.
    if new := sorted((i, text) for text, i in own.added.items() if base.added and base.added.get(text) != i):
        token_id, text = new[-1]
        beyond = vocabulary_size is not None and token_id >= vocabulary_size
        where = f"id {token_id}, beyond the base's vocabulary of {vocabulary_size}" if beyond else f"id {token_id}"
        told = f"{len(new)} tokens are added or special here and not with the base, such as"
        notes["added-tokens"] = f"{told} {shorten(text)} ({where})"
    if own.unreadable:
        notes[UNREADABLE] = f"{', '.join(own.unreadable)}: not understood, so what it says is not known"
    return Brought(notes, template)


def _of_template(text: str) -> Tokenizing:
    return Tokenizing(chat_template=_text(text))


def _of_config(text: str) -> Tokenizing:
    config = _object(text)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    listed = (config.get("added_tokens_decoder") or {}).items()
    added = {content: _id(int(i)) for i, token in listed if (content := _text(token)) is not None}
    return Tokenizing(_text(template), _text(config.get("eos_token")), added=added)


def _of_special_tokens(text: str) -> Tokenizing:
    return Tokenizing(end_token=_text(_object(text).get("eos_token")))


def _of_added_tokens(text: str) -> Tokenizing:
    return Tokenizing(added={token: _id(i) for token, i in _object(text).items() if _text(token) is not None})


def _of_tokenizer(text: str) -> Tokenizing:
    start = text.find(_ADDED)
    if start < 0:
        if not text.lstrip().startswith("{"):
            _object(text)  # which refuses it; one that begins as an object may be cut, and is not parsed
        return Tokenizing()
    listed = json.JSONDecoder().raw_decode(text[start + len(_ADDED) :].lstrip().removeprefix(":").lstrip())[0]
    return Tokenizing(added={content: _id(t["id"]) for t in listed or [] if (content := _text(t)) is not None})


def _of_generation(text: str) -> Tokenizing:
    ids = _object(text).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if ids == [None] or len(ids) > _MOST_ENDS:
        return Tokenizing()
    return Tokenizing(end_ids=tuple(sorted({_id(i) for i in ids})))


_READERS: Mapping[str, Callable[[str], Tokenizing]] = {
    "chat_template.jinja": _of_template,
    "tokenizer_config.json": _of_config,
    "special_tokens_map.json": _of_special_tokens,
    "added_tokens.json": _of_added_tokens,
    "tokenizer.json": _of_tokenizer,
    "generation_config.json": _of_generation,
}


def _object(text: str) -> dict[str, Any]:
    """Raises ValueError for anything else, but for null."""
    document = json.loads(text)
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError("no object")
    return document


def _text(token: Any) -> str | None:
    """A token is a text, or an object with its content. None for an empty one, and for halves of characters, which JSON
    can hold and no manifest can."""
    if isinstance(token, dict):
        token = token.get("content")
    sound = isinstance(token, str) and token.strip() != "" and not any("\ud800" <= c <= "\udfff" for c in token)
    return token if sound else None


def _id(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError("no token id")
    return value


def _plain(template: str | None) -> str:
    return (template or "").replace("\r\n", "\n").strip()
