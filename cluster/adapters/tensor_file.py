"""Where the tensors of a safetensors file lie, read without reading the tensors.

Layout of the file: 8 bytes little-endian header length, the header as JSON, the tensors' bytes.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.store.protocol import Store

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

_MAX_DIMENSIONS = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes weights are accepted in."""


@dataclass(frozen=True)
class TensorPlace:
    """``start`` and ``end`` are byte offsets from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(data: bytes, size_bytes: int) -> dict[str, TensorPlace]:
    """Places of all tensors of a file of ``size_bytes``, of which ``data`` holds at least the header.

    Every number is checked against the file's size before anything is allocated for it, so that a header
    that lies costs nothing. Raises ValueError saying what is wrong.
    """
    header_end = _header_end(data, size_bytes)
    if len(data) < header_end:
        raise ValueError(f"the file ends in its header: {len(data)} bytes of {header_end}")
    try:
        header = json.loads(data[8:header_end], object_pairs_hook=_without_duplicates)
    except _Duplicate as duplicate:
        raise ValueError(f"the header names {shorten(str(duplicate))} twice") from None
    except (ValueError, RecursionError):
        raise ValueError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    header.pop("__metadata__", None)
    return {name: _parse_place(name, place, header_end, size_bytes) for name, place in header.items()}


def read_header(store: Store, key: str) -> dict[str, TensorPlace]:
    """The same by two ranged reads, for files too large to read whole. Raises ValueError as above."""
    size_bytes = store.head(key).size_bytes
    if size_bytes < 8:
        raise ValueError(f"{size_bytes} bytes are too few for a header")
    length = store.read_range(key, 0, 8)
    header_end = _header_end(length, size_bytes)
    return parse_header(length + store.read_range(key, 8, header_end - 8), size_bytes)


def decode(place: TensorPlace, data: bytes) -> Tensor:
    """The tensor whose bytes are ``data``, as float32 (a copy). The dtype must be one of ``DTYPES``."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[place.dtype]).reshape(place.shape).float()


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Which of the two counts is for every reader to choose, and ours and the library's must not differ."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _Duplicate(name)
        found[name] = value
    return found


def shorten(text: str) -> str:
    """For messages, which go into manifests: what comes from outside may be 100 MB long."""
    text = repr(text)
    return text if len(text) <= 300 else text[:297] + "..."


def _header_end(data: bytes, size_bytes: int) -> int:
    if len(data) < 8:
        raise ValueError(f"{len(data)} bytes are too few for a header")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, size_bytes - 8):
        raise ValueError(f"the header claims {length} bytes in a file of {size_bytes}")
    return 8 + length


def _parse_place(name: str, place: Any, header_end: int, size_bytes: int) -> TensorPlace:
    try:
        dtype, shape, (start, end) = place["dtype"], place["shape"], place["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"tensor {shorten(name)}: no dtype, shape and data_offsets in the header") from None
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers) or not isinstance(dtype, str):
        raise ValueError(f"tensor {shorten(name)}: malformed dtype, shape or data_offsets")
    # Before they are multiplied: the product of a million numbers takes hours.
    if len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"tensor {shorten(name)}: {len(shape)} dimensions, at most {_MAX_DIMENSIONS} are read")
    if not header_end + start <= header_end + end <= size_bytes:
        raise ValueError(
            f"tensor {shorten(name)} ends at byte {header_end + end} of {size_bytes}: the file is cut short"
        )
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"tensor {shorten(name)}: shape {shape} of {dtype} does not fill its {end - start} bytes")
    return TensorPlace(dtype, tuple(shape), header_end + start, header_end + end)
