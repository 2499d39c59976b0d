"""CPU seconds and resident bytes of a server's processes, by what each is for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import psutil

_KINDS = {
    "router": r"ray::ServeReplica:bench:router",
    "replica": r"ray::ServeReplica:bench:group",
    "proxy": r"ray::ProxyActor|haproxy -",
    "haproxy's manager": r"ray::HAProxyManager",
    "controller": r"ray::ServeController",
    "engine": r"VLLM::EngineCore",
    "API": r"vllm\.entrypoints",
}


def kind_of(command: str) -> str:
    """Of a process that is none of those: "others"."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, command)), "others")


def _each(pid: int, of: Callable[[psutil.Process], float]) -> Counter[str]:
    found: Counter[str] = Counter()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found[kind_of(" ".join(process.cmdline()))] += of(process)  # type: ignore[assignment]
        except psutil.NoSuchProcess:
            continue
    return found


def num_cpus() -> int:
    return len(psutil.Process().cpu_affinity())


def cpu_seconds(pid: int) -> Counter[str]:
    """Of ``pid`` and all below it."""
    return _each(pid, lambda process: sum(process.cpu_times()[:2]))


def resident_bytes(pid: int) -> Counter[str]:
    return _each(pid, lambda process: process.memory_info().rss)
