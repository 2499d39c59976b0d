"""Sizes as people write them."""

from __future__ import annotations

import re

_BYTE_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "KB": 10**3, "MB": 10**6}
_BYTE_UNITS |= {"GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Bytes of ``80GiB``, ``80 GB`` or ``123``. Raises ValueError that says what is expected."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2] not in _BYTE_UNITS or float(match[1]) == 0:
        raise ValueError("a size such as 80GiB, or a number of bytes")
    return int(float(match[1]) * _BYTE_UNITS[match[2]])


def gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
