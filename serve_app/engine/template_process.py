"""The chat templates that adapters brought, rendered in a process of its own.

A template is a program of whoever uploaded the adapter. transformers' sandbox keeps it from files and code, not from
loops without end and texts of gigabytes; so it has a limit on time and memory here, and a process that can be killed.
What the base brings, the operator has chosen: that is rendered where it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import subprocess
import sys
import threading
import time
from typing import Any

from cluster.errors import RequestError

TIMEOUT_S = 2.0
START_TIMEOUT_S = 60.0
MEMORY_BYTES = 1 << 30  # beyond what the process has when it starts
MAX_ANSWER_BYTES = 8 << 20
_READY = b"ready\n"


class TemplateProcess:
    """Starts with the first text that is asked for; may be used by several threads. Ends with ``close``, and with the
    process that made it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up: set[str] = set()

    def render(self, template: str, messages: list[dict[str, Any]], special_tokens: dict[str, Any]) -> str:
        """The text of a chat up to where the assistant's answer begins. Raises RequestError where the template fails or
        takes too much; one that took too much is not tried again."""
        if template in self._given_up:
            raise RequestError("the adapter's chat template took too long before and is not used again", "messages")
        question = {"template": template, "messages": messages, "special_tokens": special_tokens}
        with self._lock:
            answer = self._ask(json.dumps(question).encode() + b"\n")
            if answer is None:
                self._given_up.add(template)
                self._end()
        if answer is None:
            raise RequestError(
                f"the adapter's chat template took more than {TIMEOUT_S:g} s, {MEMORY_BYTES >> 20} MiB or "
                f"{MAX_ANSWER_BYTES >> 20} MiB of text; it is not used again: correct it, and compress again",
                "messages",
            )
        if "error" in answer:
            raise RequestError(f"messages do not fit the adapter's chat template: {answer['error']}", "messages")
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, line: bytes) -> dict[str, Any] | None:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        answer = _read_line(process, TIMEOUT_S)
        return None if answer is None else dict(json.loads(answer))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serve_app.engine.template_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # This process may have found the package where the other would not look.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            if _read_line(self._process, START_TIMEOUT_S) != _READY:
                self._end()
                raise RequestError("chat templates of adapters cannot be rendered now; try again", "messages")
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            self._process = None


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """None where none has come within that time, where it is too long, and where the process has ended."""
    assert process.stdout is not None
    deadline, data = time.monotonic() + timeout_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not data.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or len(data) > MAX_ANSWER_BYTES or not selector.select(left):
                return None
            piece = process.stdout.raw.read(1 << 16)  # type: ignore[attr-defined]  # a BufferedReader over a pipe
            if not piece:
                return None
            data += piece
    return data


def _serve() -> None:
    """What runs in that process: a line of JSON in, a line of JSON out."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))
    sys.stdout.write(_READY.decode())
    sys.stdout.flush()
    for line in sys.stdin:
        question = json.loads(line)
        try:
            rendered, _ = render_jinja_template(
                conversations=[question["messages"]],
                chat_template=question["template"],
                add_generation_prompt=True,
                **question["special_tokens"],
            )
            answer = {"text": rendered[0]}
        except MemoryError:
            return
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
