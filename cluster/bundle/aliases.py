"""Names that stand for adapters: for one, or for several by weight.

    <out>/aliases.json    {"format": 1, "aliases": {"support": {"support-v7": 90, "support-v8": 10}}}

Changed by conditional PUT only: a canary is one write, and its rollback another. It stands outside the manifests, for a
name comes to mean another adapter, and moves back, without a new revision. Targets are adapters, never aliases.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from cluster.adapters.layout import is_id
from cluster.errors import BundleError, ConfigError, PublishConflict, StoreConflict, StoreMissing
from cluster.store.protocol import Store

KEY = "aliases.json"
FORMAT = 1
MAX_BYTES, MAX_ALIASES, MAX_TARGETS, MAX_WEIGHT = 4 << 20, 10_000, 32, 1_000_000
_ATTEMPTS = 8

Targets = Mapping[str, int]
"""Adapter id -> its weight: its share of the requests is that over the sum. At 0 it gets none, and keeps its place."""

Aliases = Mapping[str, Targets]

Change = Callable[[Aliases], Aliases]


def choose_target(alias: str, targets: Targets, key: bytes) -> str:
    """The adapter that answers for ``key``: the same each time, wherever it is asked.

    Semantics: argmin over the targets t of weight w_t > 0 of -ln(u_t) / w_t, with u_t in (0, 1) a hash of (alias, t,
    key). These are independent exponential clocks of rates w_t, of which t's is the first with probability
    w_t / sum(w): rendezvous hashing with weights. Where one weight changes, keys come to its target or leave that one,
    and no other key moves; the keys of two aliases fall independently.
    """

    def clock(target: str) -> tuple[float, str]:
        # Neither name holds a zero byte, so that no two triples are the same text.
        said = b"\0".join((alias.encode(), target.encode(), key))
        number = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")
        # 52 bits and a half: a float holds that exactly, and it is neither 0 nor 1.
        return -math.log(((number >> 12) + 0.5) / 2**52) / targets[target], target

    return min(clock(target) for target, weight in targets.items() if weight > 0)[1]


def alias_faults(aliases: Aliases, base_name: str, adapters: Collection[str]) -> dict[str, str]:
    """Alias -> why it does not do what it says where ``adapters`` are served, of those for which that is so."""
    faults = {}
    for name, targets in aliases.items():
        lost = [target for target, weight in targets.items() if weight > 0 and target not in adapters]
        if name == base_name or name in adapters:
            faults[name] = f"{'the base' if name == base_name else 'an adapter'} has this name, and answers to it"
        elif lost:
            faults[name] = f"its target {', '.join(lost)} is not served: what falls to it gets a 404"
    return faults


def aliases_etag(store: Store) -> str | None:
    """None where there is no such file. Raises StoreError, and BundleError where it is too large to be read."""
    try:
        entry = store.head(KEY)
    except StoreMissing:
        return None
    if entry.size_bytes > MAX_BYTES:
        raise _broken(store, f"it has {entry.size_bytes} bytes, at most {MAX_BYTES} are read")
    return entry.etag


def read_aliases(store: Store) -> tuple[Aliases, str | None]:
    """The aliases and the file's ETag; none and None where it is not there. Raises StoreError, BundleError."""
    if aliases_etag(store) is None:
        return {}, None
    try:
        blob = store.read(KEY)
    except StoreMissing:
        return {}, None
    try:
        return _checked(json.loads(blob.data, object_pairs_hook=_once)), blob.etag
    except (ValueError, RecursionError) as error:
        raise _broken(store, str(error)) from None


def change_aliases(store: Store, changed: Change) -> tuple[Aliases, Aliases]:
    """What was before, and what is now: ``changed`` of it, in one write, which a lost race begins anew.

    Raises what ``changed`` raises, ConfigError where its result cannot be, BundleError where what is there cannot be
    read, and PublishConflict when others change it all the time.
    """
    before: Aliases = {}
    after: Aliases | None = None
    for _ in range(_ATTEMPTS):
        found, etag = read_aliases(store)
        if found == after:
            return before, found  # our own, whose answer was lost
        before, after = found, changed(found)
        if after == before:
            return before, after
        document = {"format": FORMAT, "aliases": {name: dict(targets) for name, targets in after.items()}}
        data = (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
        try:
            _checked(document)
            _need(len(data) <= MAX_BYTES, f"{KEY} would have {len(data)} bytes, expected at most {MAX_BYTES}")
        except ValueError as error:
            raise ConfigError(f"{error}; nothing was changed") from None
        try:
            if etag is None:
                store.create(KEY, data)
            else:
                store.replace(KEY, data, if_match=etag)
        except StoreConflict:
            continue
        return before, after
    raise PublishConflict(f"{store.uri}/{KEY} is changed by others all the time; nothing was changed, try again")


def _checked(document: Any) -> Aliases:
    """Raises ValueError, which says what is wrong."""
    expected = f'expected {{"format": {FORMAT}, "aliases": {{...}}}}'
    _need(isinstance(document, dict), f"it is a JSON {type(document).__name__}, {expected}")
    for name in sorted({"format", "aliases"} - document.keys()):
        raise ValueError(f"key {name!r} is missing, {expected}")
    for name in sorted(document.keys() - {"format", "aliases"}):
        raise ValueError(f"unknown key {name[:100]!r}, {expected}")
    number, aliases = document["format"], document["aliases"]
    _need(type(number) is int and number == FORMAT, f"format {number!r}, this build knows format {FORMAT}")
    _need(isinstance(aliases, dict), f"aliases is a JSON {type(aliases).__name__}, expected an object")
    _need(len(aliases) <= MAX_ALIASES, f"{len(aliases)} aliases, expected at most {MAX_ALIASES}")
    for name, targets in aliases.items():
        _check_alias(name, targets)
        for target in targets:
            _need(target not in aliases, f"alias {name}: target {target} is an alias itself; name its adapters")
    return {name: dict(targets) for name, targets in aliases.items()}


def _check_alias(name: str, targets: Any) -> None:
    plain = "expected one or two segments joined by '/', as an adapter's id has"
    _need(is_id(name), f"alias {name[:100]!r}: {plain}")
    _need(isinstance(targets, dict), f"alias {name}: a JSON {type(targets).__name__}, expected adapters with weights")
    _need(len(targets) <= MAX_TARGETS, f"alias {name}: {len(targets)} targets, expected at most {MAX_TARGETS}")
    for target, weight in targets.items():
        _need(is_id(target), f"alias {name}: target {target[:100]!r}: {plain}")
        _need(
            type(weight) is int and 0 <= weight <= MAX_WEIGHT,
            f"alias {name}: weight of {target} is {str(weight)[:100]}, expected a whole number from 0 to {MAX_WEIGHT}",
        )
    _need(any(targets.values()), f"alias {name}: no target has a weight above 0, so that nobody would answer")


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each key once: which of two is meant cannot be told."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        _need(key not in made, f"key {key[:100]!r} is there twice")
        made[key] = value
    return made


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _broken(store: Store, why: str) -> BundleError:
    return BundleError(f"{store.uri}/{KEY}: {why}; correct it, or delete it: no alias is answered then")
