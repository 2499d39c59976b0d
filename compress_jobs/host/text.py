"""Text files as people's editors save them."""

from __future__ import annotations

import codecs
from pathlib import Path

from cluster.adapters.mistaken import mistaken_for
from cluster.errors import ConfigError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins like UTF-16's, so it comes first
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_text(option: str, path: Path, expected: str) -> str:
    """UTF-8, or what the file's byte order mark says; lines end as they do in the file.

    Raises ConfigError, naming ``option`` and ``path``, where it cannot be read or is no text.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{option} {path}: no regular file; give the path of {expected}")
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror}; give the path of {expected}") from None
    mark, encoding = next((m for m in _MARKS if data.startswith(m[0])), (b"", "utf-8"))
    if not mark and (what := mistaken_for(data)) is not None:
        raise ConfigError(f"{option} {path}: it is {what}")
    if not mark and b"\0" in data[:4]:
        raise ConfigError(f"{option} {path}: it is UTF-16 without a byte order mark; save it as UTF-8")
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path}: it is no UTF-8 text (byte {error.start}); save it as UTF-8") from None
