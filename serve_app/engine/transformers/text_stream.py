"""From an answer's tokens, as they come, to its text, as it may go out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Semantics: the concatenation of everything returned equals ``decode(token_ids)``, special tokens
    skipped, up to the first stop string, which is not part of it.

    Nothing is returned that a later token could change: the bytes of an unfinished character are held back,
    and so is text that may be the beginning of a stop string. Stop strings are looked for from token number
    ``min_tokens`` on. (Bytes that are no UTF-8 are the exception: a byte-fallback decoder turns the whole
    run of bytes around them into replacement characters, including characters that are out already.)
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.stopped = False
        self._tokenizer, self._stop, self._min_tokens = tokenizer, tuple(stop), min_tokens
        self._token_ids: list[int] = []
        # Tokens before _done have been turned into text. A decoder may treat the beginning of a sequence in
        # its own way (a leading space is dropped), so that the tokens from _context on are decoded with them.
        self._context, self._done = 0, 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """Text that became certain with this token; sets ``stopped`` when a stop string is complete."""
        self._token_ids.append(token_id)
        text, before = self._decode(self._context), self._decode(self._context, self._done)
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._done = self._done, len(self._token_ids)
        text = text[len(before) :]
        if len(self._token_ids) < self._min_tokens:
            return text
        return self._up_to_stop(text, hold_back=True)

    def finish(self) -> str:
        """What was still held back; called once, after the last token, unless ``stopped``."""
        text = self._decode(self._context)[len(self._decode(self._context, self._done)) :]
        return self._up_to_stop(text, hold_back=False)

    def _up_to_stop(self, text: str, hold_back: bool) -> str:
        text = self._held + text
        matches = [start for stop in self._stop if (start := text.find(stop)) >= 0]
        if matches:
            self.stopped = True
            return text[: min(matches)]
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0) if hold_back else 0
        certain = len(text) - num_held
        self._held = text[certain:]
        return text[:certain]

    def _decode(self, start: int, end: int | None = None) -> str:
        # Cleaning up would change text that is already out, and is no part of what the model said.
        text: str = self._tokenizer.decode(
            self._token_ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with, ``stop`` as a whole left aside."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
