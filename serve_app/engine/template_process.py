"""The chat templates that adapters brought, rendered in a process of its own.

A template is a program of whoever uploaded the adapter. transformers' sandbox keeps it from files and code, not from
loops without end and texts of gigabytes; so that process has a limit on CPU time and memory, and can be killed. What
the base brings, the operator has chosen: that is rendered where it is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from cluster.errors import RequestError

CPU_S = 1.0
"""Of one chat; a template of the field takes milliseconds."""
MEMORY_BYTES = 1 << 30  # beyond what the process has when it starts
MAX_MESSAGES_SIZE, MAX_MESSAGES = 1 << 20, 10_000  # characters, as JSON: far more than any context holds
MAX_TEXT_SIZE = 4 << 20
_WALL_S, _START_S = 30.0, 60.0  # where the CPU time is not up yet, for the machine has other things to do
_TRIES = 2
_READY = b"ready\n"
_TOO_MUCH = f"the adapter's chat template takes more than {CPU_S:g} s of a CPU or {MEMORY_BYTES >> 20} MiB"


class TemplateProcess:
    """Starts with the first text that is asked for; may be used by several threads. Ends with ``close``, and with the
    process that made it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._too_dear: set[str] = set()
        self._closed = False

    def render(self, template: str, messages: list[dict[str, Any]], special_tokens: dict[str, Any]) -> str:
        """The text of a chat up to where the assistant's answer begins. Raises RequestError where the template fails or
        takes too much; one that took too much is not tried again."""
        size = len(json.dumps(messages, ensure_ascii=False))
        if size > MAX_MESSAGES_SIZE or len(messages) > MAX_MESSAGES:
            raise RequestError(
                f"there are {len(messages)} messages of {size} characters, more than any context holds", "messages"
            )
        question = {"template": template, "messages": messages, "special_tokens": special_tokens}
        line = json.dumps(question).encode() + b"\n"
        with self._lock:
            # Here, for others may have found out while this one waited.
            if template in self._too_dear:
                raise RequestError(f"{_TOO_MUCH}, and is not used again", "messages")
            answer = self._ask(line)
            if answer.get("too_dear"):
                self._too_dear.add(template)
        if answer.get("too_dear"):
            raise RequestError(f"{_TOO_MUCH}; it is not used again: correct it, and compress again", "messages")
        if "error" in answer:
            raise RequestError(f"the adapter's chat template cannot render this: {answer['error']}", "messages")
        return str(answer["text"])

    def close(self) -> None:
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # whoever waits for an answer gets none
        with self._lock:
            self._end()

    def _ask(self, line: bytes) -> dict[str, Any]:
        """A process that dies (by the kernel's hand, where memory is short) says nothing of the template: a second one
        is asked. One that dies too does."""
        for _ in range(_TRIES):
            process = self._running()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
                if (answer := _read_line(process, _WALL_S)) is not None:
                    return dict(json.loads(answer))
            self._end()
        return {"too_dear": True}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise RequestError("the engine is ending", "messages")
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
            if _read_line(self._process, _START_S) != _READY:
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
    """None where none has come within that time, and where the process has ended."""
    assert process.stdout is not None
    deadline, pieces = time.monotonic() + timeout_s, [b""]
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not pieces[-1].endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                return None
            pieces.append(process.stdout.raw.read(1 << 20))  # type: ignore[attr-defined]  # a BufferedReader over a pipe
            if not pieces[-1]:
                return None
    return b"".join(pieces)


class _TooLong(Exception):
    """The CPU time of this chat is up."""


def _serve() -> None:
    """What runs in that process: a line of JSON in, a line of JSON out. It limits itself, so that an endless loop ends
    without its parent too."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, held + MEMORY_BYTES))

    def interrupt(*_: object) -> None:
        raise _TooLong

    signal.signal(signal.SIGPROF, interrupt)
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever is printed is no answer
    answers.write(_READY.decode())
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_answer(render_jinja_template, line)) + "\n")
        answers.flush()


def _answer(render: Any, line: str) -> dict[str, Any]:
    question = json.loads(line)
    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        try:
            rendered, _ = render(
                conversations=[question["messages"]],
                chat_template=question["template"],
                add_generation_prompt=True,
                **question["special_tokens"],
            )
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if len(rendered[0]) > MAX_TEXT_SIZE:
            return {"error": f"it gives {len(rendered[0])} characters, more than any context holds"}
        return {"text": rendered[0]}
    except (_TooLong, MemoryError):
        return {"too_dear": True}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


if __name__ == "__main__":
    _serve()
