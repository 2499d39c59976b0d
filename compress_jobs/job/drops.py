"""What a run must not do by the way: serve fewer adapters than are served, or refuse most of a collection."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

from cluster.bundle.manifest import Refused
from cluster.errors import AdapterRefused, WouldDrop
from compress_jobs.job.options import RunOptions, matching, may_drop
from compress_jobs.progress import say
from compress_jobs.report.refusals import counts, refusal_lines, remedy_lines

_NAMED, _MESSAGE_SIZE = 5, 160


def check_refusals(asked: RunOptions, refused: Mapping[str, Refused], num_adapters: int) -> None:
    """For where nothing is served yet. Raises WouldDrop when more are refused than ``max_refused`` allows."""
    if not asked.may_refuse(len(refused), num_adapters):
        say(*refusal_lines(refused), *remedy_lines(refused))
        raise WouldDrop(
            f"{len(refused)} of {num_adapters} adapters are refused ({counts(refused)}), --max-refused allows "
            f"{asked.max_refused}; nothing was published: see above, mend them, or go on with "
            f"--max-refused {len(refused)}"
        )


def check_restored(asked: RunOptions, refused: Mapping[str, Refused]) -> None:
    """Raises AdapterRefused where one that was asked for by id is refused."""
    for adapter_id in asked.restore:
        if adapter_id in refused:
            raise AdapterRefused(adapter_id, refused[adapter_id].reason, refused[adapter_id].message)


def check_drops(
    asked: RunOptions,
    served: AbstractSet[str],
    with_folder: AbstractSet[str],
    kept: AbstractSet[str],
    refused: Mapping[str, Refused] | None = None,
) -> None:
    """Raises WouldDrop when adapters that are ``served`` are not ``kept``, but for those that were asked to go.
    ``with_folder``: ids that have a folder, by this run's layout or by that which they are served by."""
    gone = served - kept - matching(served, asked.without)
    not_asked = served - matching(served, asked.only) if asked.only else frozenset()
    if asked.allow_missing:
        gone &= with_folder | not_asked
    if not may_drop(asked.allow_drop, len(gone)):
        raise WouldDrop(
            f"{len(gone)} of the {len(served)} adapters that are served would no longer be: "
            f"{_named(gone, refused or {}, not_asked, with_folder)}; nothing was published: mend or `remove` them, or "
            f"go on with --allow-drop {len(gone)}"
            + ("" if gone <= with_folder | not_asked else " (--allow-missing for those without a folder)")
        )


def _named(
    ids: Collection[str], refused: Mapping[str, Refused], not_asked: AbstractSet[str], with_folder: AbstractSet[str]
) -> str:
    def why(adapter_id: str) -> str:
        if adapter_id in refused:
            return _shorten(refused[adapter_id])
        if adapter_id in not_asked:
            return "--only leaves it out"
        return "its folder is not named by --id-pattern" if adapter_id in with_folder else "it has no folder"

    told = [f"{adapter_id} ({why(adapter_id)})" for adapter_id in sorted(ids)[:_NAMED]]
    return ", ".join(told) + (f", and {len(ids) - _NAMED} more" if len(ids) > _NAMED else "")


def _shorten(refused: Refused) -> str:
    cut = refused.message[:_MESSAGE_SIZE] + ("..." if len(refused.message) > _MESSAGE_SIZE else "")
    return f"{refused.reason}: {cut}"
