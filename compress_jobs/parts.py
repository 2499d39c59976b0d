"""Parts: what each step of a job leaves in ``work/`` when it has ended, so that a job which was killed and is
started again does only what is missing.

A step writes its tensors first and its part last; a part that is there stands for all that the step writes.
A step is deterministic, so the bundle's bytes are the same whoever did it, and whenever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cluster.errors import StoreMissing
from compress_jobs.context import JobContext

T = TypeVar("T")


def once(context: JobContext, name: str, kind: type[T] | Any, step: Callable[[], T]) -> T:
    """The result of ``step``, of the dataclass ``kind``: from the part ``name`` where it is there, else by doing
    it and leaving the part. A part that cannot be read is done again."""
    as_json: TypeAdapter[T] = TypeAdapter(kind)
    key = f"{context.work}{name}.json"
    store = context.out()
    try:
        return as_json.validate_json(store.read(key).data)
    except (StoreMissing, ValidationError):
        result = step()
        store.write(key, as_json.dump_json(result))
        return result
