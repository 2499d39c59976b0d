"""What was refused, for people: counted by reason, each once, and the one option that would mend a whole group."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from cluster.adapters.layout import PLAIN, layout_for, shown
from cluster.bundle.manifest import Refused

_FEW, _MOST = 3, 6
# How the messages of reason `base` end (cluster/adapters/reading.py), the name quoted for a shell.
_ACCEPT = re.compile(" --accept-base[ =]")
_UNNAMED = "--accept-unnamed-base"


def counts(refused: Mapping[str, Refused]) -> str:
    """The reasons, the most frequent first: "8 base, 3 corrupt"."""
    by_reason = Counter(refusal.reason for refusal in refused.values())
    return ", ".join(f"{count} {reason}" for reason, count in sorted(by_reason.items(), key=lambda r: (-r[1], r[0])))


def refusal_lines(refused: Mapping[str, Refused]) -> list[str]:
    """A line each, by reason."""
    ordered = sorted(refused.items(), key=lambda item: (item[1].reason, item[0]))
    return [f"refused    {adapter_id} ({refusal.reason}): {refusal.message}" for adapter_id, refusal in ordered]


def remedy_lines(refused: Mapping[str, Refused], served: Collection[str] = ()) -> list[str]:
    """Options that would accept many at once: those whose base has another name, those that lie deeper than an id (and
    then by ids that are not ``served``)."""
    lines = []
    if options := _base_options(refused.values()):
        lines.append(f"accept     if what these name is all this base: {options}")
    deep = [i for i, refusal in refused.items() if refusal.reason == "id" and i.count("/") >= len(PLAIN)]
    if deep and (layout := layout_for(deep, served)) is not None:
        patterns = shown([*PLAIN, *layout.id_patterns])
        lines.append(f"accept     {len(deep)} lie deeper than name or tenant/name; this names them: {patterns}")
    return lines


def _base_options(refused: Iterable[Refused]) -> str:
    messages = [refusal.message for refusal in refused if refusal.reason == "base"]
    names = {_name(message) for message in messages if len(_ACCEPT.findall(message)) == 1} - {""}
    options = [
        f"--accept-base{'=' if pattern.startswith('-') else ' '}{shlex.quote(pattern)}" for pattern in _patterns(names)
    ]
    if any(message.endswith(_UNNAMED) for message in messages):
        options.append(_UNNAMED)
    return " ".join(options) if len(options) <= _MOST else ""


def _name(message: str) -> str:
    """ "" where the message was cut."""
    try:
        (name,) = shlex.split(_ACCEPT.split(message)[1])
    except ValueError:
        return ""
    return name


def _patterns(names: set[str]) -> list[str]:
    """The names where they are few, else a pattern for those that begin with the same organisation or folder."""
    if len(names) <= _FEW:
        return sorted(names)
    starts = Counter(map(_start, names))
    return sorted({_start(name) + "*" if starts[_start(name)] > 1 and _start(name) else name for name in names})


def _start(name: str) -> str:
    """``/scratch/`` of /scratch/job-7/base, ``unsloth/`` of unsloth/tiny-bnb-4bit; "" where there is no slash."""
    found = re.match(r"/*[^/]+/", name)
    return found[0] if found else ""
