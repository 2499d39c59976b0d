"""Names by content: what two sides hash must come out as the same bytes on both."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor


def canonical_json(document: Any, indent: int | None = None) -> bytes:
    """JSON whose bytes depend on the content alone: sorted keys, no NaN."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(
        document, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False
    ).encode()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """A hash over names, dtypes, shapes and bytes, whatever the order."""
    digests = {
        name: [str(t.dtype), list(t.shape), hashlib.sha256(t.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()]
        for name, t in tensors.items()
    }
    return "sha256:" + hashlib.sha256(canonical_json(digests)).hexdigest()
