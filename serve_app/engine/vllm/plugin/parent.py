"""vLLM's engine process ends with the process that started it.

vLLM's workers watch its engine process, but that one watches nobody: were a replica killed hard (the kernel's OOM
killer does so), its vLLM would stay, hold the device's memory, and the replica's successor could not start.
"""

from __future__ import annotations

import os
import threading
import time

_VARIABLE = "COMPRESS_THEN_SERVE_PARENT"
_PERIOD_S = 1.0


def announce() -> None:
    """Called in the parent, before vLLM is started."""
    os.environ[_VARIABLE] = str(os.getpid())


def end_with_parent() -> None:
    """Called in each of vLLM's processes, possibly more than once; watches in those that an announced process started
    itself."""
    parent = os.getppid()
    if os.environ.get(_VARIABLE) == str(parent):
        del os.environ[_VARIABLE]  # one watch is enough
        threading.Thread(target=_watch, args=(parent,), name="watch-parent", daemon=True).start()


def _watch(parent: int) -> None:
    # An orphan gets another parent. (Linux's PR_SET_PDEATHSIG would follow the thread that started us, which may end.)
    while os.getppid() == parent:
        time.sleep(_PERIOD_S)
    os._exit(1)
