"""``compact``: bases fitted anew, when those that stand have drifted or to leave adapters out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Collection
from collections.abc import Set as AbstractSet
from typing import Any

from cluster.bundle.removed import note_removed
from cluster.compression.methods import METHODS
from cluster.errors import PublishConflict
from compress_jobs.commands.drops import ALLOW_DROP, drops_allowed
from compress_jobs.job.options import RunOptions, accepted_names, matching
from compress_jobs.lifecycle.compact import Drift, refit_options
from compress_jobs.lifecycle.revision import Standing, open_current

DEFAULT_LEVEL = 0.1
_COMPACT = """\
Fit the bundle's bases anew, by the method in its manifest, for the adapters that are served now, as the collection has
them now: the same job as `run`, a new bundle. It does so when drift passes a level, and always with --without.

  drift    the larger of two figures, both 0 right after a `run`:
  alone    the share of truncated and raw adapters among all, less that share among those that were fitted
           (adapters that the bundle's method keeps raw by wish do not count)
  error    how much the added adapters raise the mean error of those on a basis: mean over fitted and added, divided by
           mean over the fitted, less 1

At or below the level it says so and does nothing. Folders of the collection that the current revision does not serve
are left out (`add` them first). Names of the base that were accepted before are accepted again. A served adapter that
the collection no longer has, or that can no longer be accepted, stops it: see --allow-missing and --allow-drop.

--without ID leaves an adapter out and so proves its trace gone: the job never reads its folder, so that no basis, core,
cluster or figure of the new bundle can depend on it. The former bundle keeps it until `gc` deletes that, and so does
the collection until its folder is deleted.
"""


def add_parser(commands: Any) -> None:
    compact = commands.add_parser(
        "compact",
        help="fit the bases anew, when they have drifted or to leave adapters out",
        description=_COMPACT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compact.add_argument("out", metavar="OUT", help="where the bundle is published")
    compact.add_argument("--adapters", metavar="URI", required=True, help="the collection, as `run` was given it")
    compact.add_argument("--base", metavar="URI", required=True, help="the base model's folder")
    compact.add_argument(
        "--without",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        default=[],
        help="leave these out: ids, or patterns with *",
    )
    compact.add_argument(
        "--drift", metavar="LEVEL", type=float, default=DEFAULT_LEVEL, help=f"level (default: {DEFAULT_LEVEL:g})"
    )
    compact.add_argument(
        "--accept-base", metavar="NAME", action="append", default=[], help="as for `run`, besides those accepted before"
    )
    compact.add_argument("--accept-unnamed-base", action="store_true", help="as for `run`")
    compact.add_argument(
        "--id-pattern", metavar="PATTERN", action="append", default=[], help="as for `run`, in place of the manifest's"
    )
    compact.add_argument(
        "--allow-missing", action="store_true", help="drop served adapters that have no folder any more"
    )
    compact.add_argument("--allow-drop", metavar="N|all", type=drops_allowed, default="0", help=ALLOW_DROP)
    compact.add_argument("--num-cpus", metavar="N", type=int, default=0, help="as for `run`")
    compact.set_defaults(execute=_execute)


def _execute(parsed: argparse.Namespace) -> int:
    began, standing = time.monotonic(), open_current(parsed.out)
    manifest = standing.manifest
    if not parsed.without and manifest.method.name not in METHODS:
        print(f"nothing    method {manifest.method.name} has no bases that could drift")
        return 0
    drift = Drift.of(manifest)
    print("\n".join(drift.lines(parsed.drift)))
    if not parsed.without and drift.figure <= parsed.drift:
        print("nothing    drift is not above the level: the bases stay as they are")
        return 0
    options = refit_options(
        standing,
        parsed.adapters,
        parsed.base,
        parsed.without,
        accepted_names(parsed.accept_base, parsed.accept_unnamed_base),
        parsed.num_cpus,
        parsed.allow_missing,
        parsed.allow_drop,
        tuple(parsed.id_pattern),
    )
    # Here, for Ray is slow to import, and starts only where something is fitted.
    from compress_jobs.job import ray_cluster
    from compress_jobs.job.prepare import prepare
    from compress_jobs.job.run import run

    job = prepare(options)
    ray_cluster.connect(options)
    if job.seen_current != standing.seen_current:
        raise PublishConflict(f"{options.out}: CURRENT has moved meanwhile; nothing was changed, compact again")
    note_removed(standing.store, matching(options.without, parsed.without) - job.notes.keys())
    outcome = run(job)
    if outcome.unfinished:
        print(f"warning    {outcome.unfinished}")
    if outcome.summary is None:
        print(f"unchanged  {outcome.manifest.bundle} is what a refit gives; nothing was written")
        return 0
    print("\n".join(outcome.summary.lines(outcome.manifest)))
    print("\n".join(_told(standing, options, parsed.without, job.notes.keys())))
    print(f"took       {time.monotonic() - began:.1f} seconds")
    print(f"bundle     {outcome.manifest.bundle} revision 0, published at {options.out}; a new deploy serves it")
    return 0


def _told(standing: Standing, options: RunOptions, without: Collection[str], notes: AbstractSet[str]) -> list[str]:
    """``notes``: who was removed before. Nothing is read: the bundle is published already."""
    lines, asked = [], matching(options.without, without)
    removed = notes & set(options.without) - asked
    if removed:
        lines.append(
            f"left out   {' '.join(sorted(removed))}: removed; `run` or `add` with --restore takes one up again"
        )
    if others := sorted(set(options.without) - asked - removed):
        lines.append(f"left out   {len(others)} folders that are not served, such as {others[0]}: `add` takes them up")
    if asked:
        lines.append(
            f"without    {' '.join(sorted(asked))}: never read, so nothing of the new bundle depends on it; "
            f"{standing.manifest.bundle} still does until `gc` deletes it (at once: --grace 0s --keep 1)"
        )
    return lines
