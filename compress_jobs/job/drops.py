"""What a run must not do by the way: serve fewer adapters than are served, or refuse most of a collection."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from cluster.adapters.record import AdapterFiles
from cluster.bundle.manifest import Refused
from cluster.errors import WouldDrop
from compress_jobs.job.options import RunOptions

_NAMED, _MESSAGE_SIZE = 5, 160


def check_refusals(asked: RunOptions, refused: Mapping[str, Refused], num_adapters: int) -> None:
    """For where nothing is published yet. Raises WouldDrop when more are refused than ``max_refused`` allows."""
    if not asked.may_refuse(len(refused), num_adapters):
        raise WouldDrop(
            f"{len(refused)} of {num_adapters} adapters are refused, --max-refused allows {asked.max_refused}: "
            f"{_named(refused, refused)}; nothing was published: mend them, or go on with --max-refused {len(refused)}"
        )


def check_drops(
    asked: RunOptions,
    served: AbstractSet[str],
    folders: Sequence[AdapterFiles],
    kept: AbstractSet[str],
    refused: Mapping[str, Refused] | None = None,
) -> None:
    """Raises WouldDrop when adapters that are ``served`` are not ``kept``, but for those that were asked to go."""
    with_folder = {files.adapter_id for files in folders}
    gone = served - kept - set(asked.without)
    if asked.allow_missing:
        gone &= with_folder
    if not asked.may_drop(len(gone)):
        raise WouldDrop(
            f"{len(gone)} of the {len(served)} adapters that are served would no longer be: "
            f"{_named(gone, refused or {})}; nothing was published: mend them, `remove` them, or go on with "
            f"--allow-drop {len(gone)}"
            + ("" if gone <= with_folder else " (--allow-missing for those without a folder)")
        )


def _named(ids: Collection[str], refused: Mapping[str, Refused]) -> str:
    told = [f"{i} ({_why(refused[i]) if i in refused else 'it has no folder'})" for i in sorted(ids)]
    more = f", and {len(told) - _NAMED} more" if len(told) > _NAMED else ""
    return ", ".join(told[:_NAMED]) + more


def _why(refused: Refused) -> str:
    cut = refused.message[:_MESSAGE_SIZE] + ("..." if len(refused.message) > _MESSAGE_SIZE else "")
    return f"{refused.reason}: {cut}"
