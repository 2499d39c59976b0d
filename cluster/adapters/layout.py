"""How the folders of a collection become ids, where they do not lie as ``name`` or ``tenant/name`` themselves: in a
hub's cache, or as an experiment tracker keeps its runs."""

from __future__ import annotations

import functools
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from cluster.errors import ConfigError

PLAIN = ("{name}", "{tenant}/{name}")
_PART = re.compile(r"\{name\}|\{tenant\}|\*|[^*{}]+")
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_STARS = 3
# Names of folders that say nothing of the adapter in them.
_GENERIC = re.compile(r"artifacts?|models?|adapters?|lora|final|best|last|outputs?|snapshots|checkpoint.*|v\d+")
_HUB = re.compile(r"models--.+?--.+")


@dataclass(frozen=True)
class Layout:
    """``id_patterns``: paths with {name} once, {tenant} at most once, and * for what does not matter, within a segment
    each; the first that matches a folder's whole path gives its id, ``name`` or ``tenant/name``. Without patterns the
    path is the id. ``checkpoints``: folders within an adapter's folder are adapters too.

    Raises ConfigError from its constructor.
    """

    id_patterns: tuple[str, ...] = ()
    checkpoints: bool = False

    def __post_init__(self) -> None:
        for pattern in self.id_patterns:
            _compiled(pattern)

    def id_of(self, folder: str) -> str | None:
        """None where no pattern matches: no adapter."""
        if not self.id_patterns:
            return folder
        for pattern in self.id_patterns:
            if found := _compiled(pattern).fullmatch(folder):
                parts = found.groupdict()
                return f"{parts['tenant']}/{parts['name']}" if "tenant" in parts else parts["name"]
        return None


def is_id(text: str) -> bool:
    """One or two plain segments."""
    segments = text.split("/")
    return 1 <= len(segments) <= len(PLAIN) and all(map(_SEGMENT.fullmatch, segments))


def layout_for(folders: Collection[str], taken: Collection[str] = ()) -> Layout | None:
    """Patterns that name every one of the folders, where some lie deeper than an id may, by ids that are none of those
    ``taken``; None where there are none."""
    depths: dict[int, list[str]] = {}
    for folder in sorted(folders):
        depths.setdefault(folder.count("/") + 1, []).append(folder)
    if any("" in folder.split("/") or not folder.isprintable() for folder in folders):
        return None
    deep = [_pattern_for(members) for depth, members in sorted(depths.items()) if depth > len(PLAIN)]
    if None in deep:
        return None
    plain = [PLAIN[depth - 1] for depth in sorted(depths) if depth <= len(PLAIN)]
    layout = Layout((*plain, *filter(None, deep)))
    ids = {layout.id_of(folder) for folder in folders}
    return layout if len(ids) == len(folders) and ids.isdisjoint(taken) else None


def _pattern_for(folders: Sequence[str]) -> str | None:
    """For folders of one depth: what is the same in all stays as it is; of the rest one or two segments are the id."""
    columns = list(zip(*(folder.split("/") for folder in folders), strict=True))
    constant = [column[0] if len(set(column)) == 1 and not re.search("[*{}]", column[0]) else "*" for column in columns]
    for pattern in _candidates(columns, constant):
        ids = Counter(Layout((pattern,)).id_of(folder) or "" for folder in folders)
        if max(ids.values()) == 1 and all(map(is_id, ids)):
            return pattern
    return None


def _candidates(columns: Sequence[Sequence[str]], constant: list[str]) -> Iterator[str]:
    def with_parts(parts: dict[int, str]) -> str:
        return "/".join(parts.get(index, part) for index, part in enumerate(constant))

    hubs = [index for index, column in enumerate(columns) if all(map(_HUB.fullmatch, column))]
    for index in hubs:
        yield with_parts({index: "models--{tenant}--{name}", index + 1: "snapshots", index + 2: "*"})
        yield with_parts({index: "models--{tenant}--{name}"})
    varying = [index for index, part in enumerate(constant) if part == "*"]
    if not varying:  # one folder: the last that says something
        telling = [index for index, part in enumerate(constant) if not _GENERIC.fullmatch(part.lower())]
        varying = [telling[-1] if telling else 0]
    if len(varying) == 2:
        yield with_parts({varying[0]: "{tenant}", varying[1]: "{name}"})
    for index in reversed(varying):
        yield with_parts({index: "{name}"})
    for first, second in combinations(varying, 2):
        yield with_parts({first: "{tenant}", second: "{name}"})


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = _PART.findall(pattern)
    stars = max(segment.count("*") for segment in pattern.split("/"))  # each costs a match a factor of its length
    sound = "".join(parts) == pattern and pattern.isprintable() and "" not in pattern.split("/") and stars <= _STARS
    if not sound or parts.count("{name}") != 1 or parts.count("{tenant}") > 1:
        raise ConfigError(
            f"--id-pattern {pattern!r}: expected a folder's path below --adapters with {{name}} once, {{tenant}} at "
            "most once, and * for what does not matter, such as '{tenant}/{name}/artifacts/model'"
        )
    return re.compile("".join(map(_expression, parts)), re.DOTALL)


def _expression(part: str) -> str:
    if part == "*":
        return "[^/]*"
    return f"(?P<{part[1:-1]}>[^/]+?)" if part.startswith("{") else re.escape(part)


def shown(patterns: Iterable[str]) -> str:
    """As options of a command line."""
    return " ".join(f"--id-pattern {shlex.quote(pattern)}" for pattern in patterns)
