"""What is published under ``<out>``, by key: CURRENT, the revisions of bundles, the objects.

<out>/CURRENT                                          which bundle and revision is current
<out>/bundles/<bundle_id>/revisions/<n>/manifest.json  what has no manifest does not exist
<out>/objects/<sha256>.safetensors                     content-addressed tensors
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from cluster.bundle.manifest import Manifest
from cluster.bundle.parsing import parse_manifest
from cluster.errors import BundleError, StoreMissing
from cluster.store.protocol import Blob, Store

_BUNDLE_ID = re.compile(r"b-[0-9a-f]{16}")
_REVISION = re.compile(r"0|[1-9][0-9]*")


@dataclass(frozen=True)
class Current:
    """Content of CURRENT. ``token`` is the writer's own, by which it recognises a lost answer."""

    bundle: str
    revision: int
    token: str


def object_key(sha: str) -> str:
    return f"objects/{sha.removeprefix('sha256:')}.safetensors"


def manifest_key(bundle: str, revision: int) -> str:
    return revision_key(bundle, revision, "manifest.json")


def revision_key(bundle: str, revision: int, name: str) -> str:
    """Of a file beside the manifest."""
    return f"bundles/{bundle}/revisions/{revision}/{name}"


def read_current(store: Store) -> tuple[Current, str] | None:
    """CURRENT and its ETag, or None where nothing was ever published."""
    try:
        return parse_current(store, store.read("CURRENT"))
    except StoreMissing:
        return None


def parse_current(store: Store, blob: Blob) -> tuple[Current, str]:
    try:
        current = Current(**json.loads(blob.data))
        if _BUNDLE_ID.fullmatch(current.bundle) is None or type(current.revision) is not int or current.revision < 0:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise BundleError(
            f"{store.uri}/CURRENT is {blob.data[:80]!r}, expected bundle, revision and token as JSON; "
            "delete it to start over, or point it at a published revision"
        ) from None
    return current, blob.etag


def newest_revision(store: Store, bundle: str) -> int:
    """The highest revision with a manifest. Raises StoreMissing when there is none."""
    prefix = f"bundles/{bundle}/revisions/"
    numbers = [
        int(part[0])
        for entry in store.list(prefix)
        if _REVISION.fullmatch((part := entry.key.removeprefix(prefix).split("/"))[0]) and part[1:] == ["manifest.json"]
    ]
    if not numbers:
        raise StoreMissing(f"{store.uri}: no bundle {bundle!r} there; look at {store.uri}/bundles/ for those that are")
    return max(numbers)


def read_manifest(store: Store, bundle: str, revision: int) -> Manifest:
    """Raises StoreMissing when it is not there, BundleError when it is not a valid manifest of that name."""
    key = manifest_key(bundle, revision)
    manifest = parse_manifest(store.read(key).data, f"{store.uri}/{key}")
    if (manifest.bundle, manifest.revision) != (bundle, revision):
        raise BundleError(
            f"{store.uri}/{key} calls itself {manifest.bundle} revision {manifest.revision}; "
            "a manifest cannot be moved or copied, publish it again"
        )
    return manifest


def read_object(store: Store, sha: str, where: str) -> dict[str, Tensor]:
    """Tensors of a content-addressed object. Raises BundleError when its bytes do not have that hash."""
    return parse_object(read_bytes(store, sha, where), sha, where)


def read_bytes(store: Store, sha: str, where: str) -> bytes:
    """Of a content-addressed object. Raises BundleError when they do not have that hash."""
    data = store.read(object_key(sha)).data
    seen = "sha256:" + hashlib.sha256(data).hexdigest()
    if seen != sha:
        raise BundleError(
            f"{where}: object {object_key(sha)} is corrupt: its hash is {seen[:19]}..., {sha[:19]}... was written; "
            "delete it and run the compression job again"
        )
    return data


def parse_object(data: bytes, sha: str, where: str) -> dict[str, Tensor]:
    """Raises BundleError."""
    try:
        tensors: dict[str, Tensor] = load_tensors(data)
        return tensors
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(f"{where}: object {object_key(sha)} is not safetensors ({error})") from None
