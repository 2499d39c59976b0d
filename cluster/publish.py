"""Writing a bundle: objects first, then the manifest, then CURRENT. What has no manifest does not exist."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from uuid import uuid4

from safetensors.torch import save as save_tensors
from torch import Tensor

from cluster.bundle import Current, manifest_key, object_key, read_current, read_manifest, revision_key
from cluster.errors import BundleError, PublishConflict, StoreConflict, StoreMissing
from cluster.manifest import Manifest
from cluster.store import Store


@dataclass(frozen=True)
class StoredObject:
    sha: str
    size_bytes: int


def put_object(store: Store, tensors: dict[str, Tensor]) -> StoredObject:
    """Store tensors under the hash of their bytes, once. An object that is there but corrupt is replaced."""
    data: bytes = save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()})
    stored = StoredObject("sha256:" + hashlib.sha256(data).hexdigest(), len(data))
    key = object_key(stored.sha)
    try:
        store.create(key, data)
    except StoreConflict:
        if store.read(key).data != data:
            store.write(key, data)
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

    ``seen_current`` is CURRENT's ETag when the job began, None if there was none. A bundle of the same
    content that is already there is not written again. Returns the manifest that CURRENT now names.
    Raises BundleError when an object is missing, PublishConflict when CURRENT has moved since.
    """
    if missing := missing_objects(store, manifest):
        raise BundleError(f"{store.uri}: {len(missing)} objects of {manifest.bundle} are missing, such as {missing[0]}")
    manifest = _create_manifest(store, manifest)
    store.write(revision_key(manifest.bundle, manifest.revision, "report.json"), report)
    move_current(store, manifest, seen_current)
    return manifest


def move_current(store: Store, manifest: Manifest, seen_current: str | None) -> None:
    """Point CURRENT at ``manifest`` if it is still what it was. Raises PublishConflict otherwise."""
    wanted = Current(manifest.bundle, manifest.revision, uuid4().hex)
    data = (json.dumps(asdict(wanted), sort_keys=True) + "\n").encode()
    try:
        if seen_current is None:
            store.create("CURRENT", data)
        else:
            store.replace("CURRENT", data, if_match=seen_current)
    except StoreConflict:
        found = read_current(store)
        # Our own token: the write had succeeded and only its answer was lost. Another's token on the same
        # revision: a job over the same inputs was faster, and what was to be published is.
        if found is not None and (found[0].bundle, found[0].revision) == (wanted.bundle, wanted.revision):
            return
        there = f"bundle {found[0].bundle} revision {found[0].revision}" if found else "nothing"
        raise PublishConflict(
            f"{store.uri}/CURRENT was moved to {there} by another job while this one ran; "
            f"bundle {manifest.bundle} is complete but not current: run the job again if it should be"
        ) from None


def _create_manifest(store: Store, manifest: Manifest) -> Manifest:
    try:
        store.create(manifest_key(manifest.bundle, manifest.revision), manifest.to_json())
    except StoreConflict:
        # The id names the content, so what is there is the same bundle: a former run's, a racing job's, or
        # our own after a lost answer. Only ETags may differ.
        return read_manifest(store, manifest.bundle, manifest.revision)
    return manifest
