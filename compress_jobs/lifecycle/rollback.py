"""``rollback``: CURRENT back to an earlier revision."""

from __future__ import annotations

import re

from cluster.bundle.manifest import Manifest
from cluster.bundle.publish import missing_objects, move_current
from cluster.bundle.revisions import manifest_key, read_manifest
from cluster.errors import BundleError, ConfigError, StoreConflict, StoreMissing, WouldDrop
from compress_jobs.job.options import may_drop
from compress_jobs.lifecycle.aliased import warnings
from compress_jobs.lifecycle.revision import Standing, open_current

_NAMED = 5
_TARGET = re.compile(r"(?:(?P<bundle>b-[0-9a-f]{16})/)?(?P<revision>0|[1-9][0-9]*)")


def roll_back(out: str, to: str | None, allow_drop: str = "0") -> list[str]:
    """Returns what it did, in lines. ``allow_drop``: how many adapters that are served may be missing there, or "all".

    Raises ConfigError where there is no such revision, WouldDrop where more are missing, BundleError where objects of
    it are, PublishConflict when CURRENT has moved meanwhile; CURRENT is as it was then.
    """
    standing = open_current(out)
    now = standing.manifest
    bundle, revision = _target(now, to)
    target = _hold(standing, bundle, revision)
    back, gone = sorted(target.adapters.keys() - now.adapters.keys()), sorted(now.adapters.keys() - target.adapters)
    if not may_drop(allow_drop, len(gone)):
        told = " ".join(gone[:_NAMED]) + (f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else "")
        raise WouldDrop(
            f"{bundle} revision {revision} lacks {len(gone)} of the {len(now.adapters)} adapters that are served: "
            f"{told}; CURRENT was not moved: go on with --allow-drop {len(gone)}"
        )
    if missing := missing_objects(standing.store, target):
        raise BundleError(
            f"{out}: {len(missing)} objects of {bundle} revision {revision} are missing, such as {missing[0]}; "
            "CURRENT was not moved: roll back to another revision, or `run` again"
        )
    move_current(standing.store, target, standing.seen_current)
    lines = [f"served     {len(target.adapters)} adapters now, {len(now.adapters)} before"]
    lines += [f"back       {' '.join(back)}"] if back else []
    lines += [f"gone       {' '.join(gone)}"] if gone else []
    lines += warnings(standing.store, target)
    return [*lines, f"bundle     {bundle} revision {revision} is current at {out} (before: {_name(now)})"]


def _target(now: Manifest, to: str | None) -> tuple[str, int]:
    if to is None:
        if now.parent is None:
            raise ConfigError(f"{_name(now)} has no parent to roll back to; name a revision by --to")
        return now.bundle, now.parent
    named = _TARGET.fullmatch(to)
    if named is None:
        raise ConfigError(f"--to {to}: expected the number of a revision, or <bundle>/<number>")
    bundle, revision = named["bundle"] or now.bundle, int(named["revision"])
    if (bundle, revision) == (now.bundle, now.revision):
        raise ConfigError(f"--to {to}: that is the current revision")
    return bundle, revision


def _hold(standing: Standing, bundle: str, revision: int) -> Manifest:
    """The manifest, written once more so that it is young: a gc that is running leaves it alone then."""
    store, key = standing.store, manifest_key(bundle, revision)
    try:
        blob = store.read(key)
        store.replace(key, blob.data, if_match=blob.etag)
        return read_manifest(store, bundle, revision)
    except (StoreMissing, StoreConflict):
        raise ConfigError(
            f"{store.uri}: no revision {revision} of bundle {bundle} there (any more); roll back to another one"
        ) from None


def _name(manifest: Manifest) -> str:
    return f"{manifest.bundle} revision {manifest.revision}"
