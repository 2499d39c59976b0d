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

from cluster.store import Store

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

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
        header = json.loads(data[8:header_end])
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
        raise ValueError(f"tensor {name!r}: no dtype, shape and data_offsets in the header") from None
    numbers = [*shape, start, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(dtype, str):
        raise ValueError(f"tensor {name!r}: malformed dtype, shape or data_offsets")
    if not header_end + start <= header_end + end <= size_bytes:
        raise ValueError(f"tensor {name!r} ends at byte {header_end + end} of {size_bytes}: the file is cut short")
    if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError(f"tensor {name!r}: shape {shape} of {dtype} does not fill its {end - start} bytes")
    return TensorPlace(dtype, tuple(shape), header_end + start, header_end + end)
