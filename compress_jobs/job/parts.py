"""Parts: what each step of a job leaves in ``work/`` when it has ended, so that a job which was killed and is
started again does only what is missing.

A step writes its tensors first and its part last; a part that is there stands for all that the step writes.
Both are sealed by a hash of their bytes: what was damaged since is never trusted, but done again.
A step is deterministic, so the bundle's bytes are the same whoever did it, and whenever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from pydantic import TypeAdapter
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cluster.errors import StoreError, StoreMissing
from compress_jobs.job.context import JobContext

T = TypeVar("T")


def once(
    context: JobContext,
    name: str,
    kind: type[T] | Any,
    step: Callable[[], T],
    stands: Callable[[T], bool] | None = None,
) -> T:
    """The result of ``step``, of the dataclass ``kind``: from the part ``name`` where it is there and ``stands``
    (what else the step wrote is there and whole), else by doing the step and leaving the part."""
    as_json: TypeAdapter[T] = TypeAdapter(kind)
    key = f"{context.work}{name}.json"
    store = context.out()
    try:
        found = as_json.validate_json(_unseal(store.read(key).data))
        if stands is None or stands(found):
            return found
    except (StoreMissing, ValueError):  # pydantic's ValidationError is one
        pass
    result = step()
    store.write(key, _seal(as_json.dump_json(result)))
    return result


def write_tensors(context: JobContext, key: str, tensors: dict[str, Tensor]) -> None:
    context.out().write(key, _seal(save_tensors(tensors)))


def read_tensors(context: JobContext, key: str) -> dict[str, Tensor]:
    """Raises StoreMissing, and StoreError when they are not what was written."""
    store = context.out()
    try:
        tensors: dict[str, Tensor] = load_tensors(_unseal(store.read(key).data))
    except ValueError as error:
        raise StoreError(f"{store.uri}/{key}: {error}; run the job again, it does this part anew") from None
    return tensors


def tensors_stand(context: JobContext, keys: Iterable[str]) -> bool:
    """Whether all of them are there and whole."""
    store = context.out()
    try:
        for key in keys:
            _unseal(store.read(key).data)
    except (StoreMissing, ValueError):
        return False
    return True


def _seal(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def _unseal(sealed: bytes) -> bytes:
    seal, _, data = sealed.partition(b"\n")
    if hashlib.sha256(data).hexdigest().encode() != seal:
        raise ValueError("damaged, its bytes are not those that were written")
    return data
