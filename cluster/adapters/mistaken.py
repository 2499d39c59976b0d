"""Files that are not what their name says, told by their first bytes, each with what to do."""

from __future__ import annotations

import re

_HEAD_BYTES = 512
_UPLOAD = "; upload the file itself"
_PICKLED = "a pickle under another name; pickle is never loaded, save it with safetensors"
# A pickle of protocol 2 to 5 begins so, and ends with a dot.
_PICKLE = re.compile(rb"\x80[\x02-\x05]")


def mistaken_for(data: bytes) -> str | None:
    """What a file is whose first bytes are ``data``, and the remedy; None where that cannot be told. For files that
    were found not to be what they should."""
    head = data[:_HEAD_BYTES]
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for; run `git lfs pull` and upload again"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, such as a login or an error" + _UPLOAD
    if text.startswith((b"<?xml", b"<error")):
        return "an XML document, such as an object store's error" + _UPLOAD
    if head.startswith(b"PK\x03\x04"):
        # torch.save writes a zip whose first entry is data.pkl.
        return _PICKLED if b"data.pkl" in head else "a zip archive" + _UPLOAD + " that is in it"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive" + _UPLOAD + " that is in it"
    if _PICKLE.match(head):
        return _PICKLED
    if text.startswith(b"{") and b"weight_map" in head:
        return "the index of a file in shards; save it as one"
    return None
