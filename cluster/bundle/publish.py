"""Writing a bundle: objects first, then the manifest, then CURRENT. What has no manifest does not exist."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from uuid import uuid4

from safetensors.torch import save as save_tensors
from torch import Tensor

from cluster.bundle.manifest import Manifest
from cluster.bundle.revisions import Current, manifest_key, object_key, read_current, read_manifest, revision_key
from cluster.errors import BundleError, PublishConflict, StoreConflict, StoreForbidden, StoreMissing, StoreUnreachable
from cluster.store.protocol import Store


@dataclass(frozen=True)
class StoredObject:
    sha: str
    size_bytes: int


def put_object(store: Store, tensors: dict[str, Tensor]) -> StoredObject:
    """Store tensors under the hash of their bytes.

    What is there already is written again: a corrupt object is repaired, and an old one, which nothing may have
    needed any more, is young again, so that ``gc`` leaves it to the job that is about to publish it.
    """
    data: bytes = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    stored = StoredObject("sha256:" + hashlib.sha256(data).hexdigest(), len(data))
    store.write(object_key(stored.sha), data)
    return stored


def missing_objects(store: Store, manifest: Manifest) -> list[str]:
    """Objects of the manifest that are absent or of another size."""
    missing = []
    for sha, size_bytes in sorted(manifest.objects.items()):
        try:
            if store.head(object_key(sha)).size_bytes != size_bytes:
                missing.append(sha)
        except StoreMissing:
            missing.append(sha)
    return missing


def publish(store: Store, manifest: Manifest, report: bytes, seen_current: str | None) -> Manifest:
    """Make ``manifest`` the current revision; its objects must already be stored.

    ``seen_current`` is CURRENT's ETag when the job began, None if there was none. Revision 0 of a bundle that is
    already there is not written anew, for its id names its content; a later revision that is already there must be
    this very one. Returns the manifest that CURRENT now names.
    Raises BundleError when an object is missing, PublishConflict when another job has taken this revision or has
    moved CURRENT since.
    """
    if missing := missing_objects(store, manifest):
        raise BundleError(_missing(store, manifest, missing))
    manifest, is_ours = _create_manifest(store, manifest)
    store.write(revision_key(manifest.bundle, manifest.revision, "report.json"), report)
    # Once more: from here on the manifest keeps `gc` from them, until here nothing but their age did.
    if missing := missing_objects(store, manifest):
        if is_ours:
            store.delete(manifest_key(manifest.bundle, manifest.revision))
            store.delete(revision_key(manifest.bundle, manifest.revision, "report.json"))
        raise BundleError(_missing(store, manifest, missing))
    move_current(store, manifest, seen_current)
    return manifest


def move_current(store: Store, manifest: Manifest, seen_current: str | None) -> None:
    """Point CURRENT at ``manifest`` if it is still what it was. Raises PublishConflict otherwise."""
    wanted = Current(manifest.bundle, manifest.revision, uuid4().hex)
    data = (json.dumps(asdict(wanted), sort_keys=True) + "\n").encode()
    try:
        found = _moved(store, data, seen_current)
    except (StoreUnreachable, StoreForbidden) as error:
        told = (
            f"{error}; whether CURRENT has moved cannot be told: start the same line again, or `show` what is published"
        )
        raise type(error)(told) from None
    # Our own token: the write had succeeded and only its answer was lost. Another's token on the same revision: a job
    # over the same inputs was faster, and what was to be published is.
    if found is None or (found.bundle, found.revision) == (wanted.bundle, wanted.revision):
        return
    revision = f" revision {manifest.revision}" if manifest.revision else ""
    there = f"bundle {found.bundle} revision {found.revision}" if found.bundle else "nothing"
    raise PublishConflict(
        f"{store.uri}/CURRENT was moved to {there} by another job while this one ran; "
        f"bundle {manifest.bundle}{revision} is complete but not current: run the job again if it should be"
    )


def _moved(store: Store, data: bytes, seen_current: str | None) -> Current | None:
    """None where CURRENT was moved to ``data``; else what it names, an empty one where it is gone."""
    try:
        if seen_current is None:
            store.create("CURRENT", data)
        else:
            store.replace("CURRENT", data, if_match=seen_current)
    except StoreConflict:
        found = read_current(store)
        return found[0] if found else Current("", 0, "")
    return None


def _create_manifest(store: Store, manifest: Manifest) -> tuple[Manifest, bool]:
    """The manifest that stands under its key now, and whether this call has created it."""
    key, data = manifest_key(manifest.bundle, manifest.revision), manifest.to_json()
    try:
        store.create(key, data)
        return manifest, True
    except StoreConflict:
        found = store.read(key).data
    if found != data:
        if manifest.revision > 0:
            raise PublishConflict(
                f"{store.uri}: revision {manifest.revision} of bundle {manifest.bundle} was published by another job "
                "while this one ran; nothing of either is lost: run this one again, on top of it"
            )
        # The id names the content, so what is there is the same bundle, a former run's or a racing job's: only
        # ETags may differ. (Equal bytes: the same, or our own after a lost answer.)
        manifest = read_manifest(store, manifest.bundle, 0)
    store.write(key, found)  # young again, as an object is that is put again
    return manifest, False


def _missing(store: Store, manifest: Manifest, missing: list[str]) -> str:
    return (
        f"{store.uri}: {len(missing)} objects of {manifest.bundle} are missing, such as {missing[0]}; CURRENT was not "
        "moved: run the job again (did `gc` run with a grace shorter than the job?)"
    )
