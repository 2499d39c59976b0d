"""CPUs that this process may use, which in a container or a batch system are fewer than the host has."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath


def available_cpus(root: Path = Path("/")) -> int:
    """Those of the process's affinity (``taskset``, a cpuset), and no more than the quota of its cgroup or of one
    above it, rounded up; at least 1. ``root`` is where /proc and /sys are found."""
    affine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affine, *map(math.ceil, _quotas(root))]))


def _quotas(root: Path) -> list[float]:
    """In CPUs. Only the root that a container sees is looked at by most libraries; a service of systemd, or a batch
    system, has its quota in a cgroup below the host's."""
    found = []
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for mount in _mounts(root, controllers.split(",")):
                # Of a container without a cgroup namespace the path is the host's: what is not there sets no quota.
                parts = PurePosixPath(path.lstrip("/"))
                found += [quota for folder in (parts, *parts.parents) if (quota := _quota(mount / folder)) is not None]
    return found


def _mounts(root: Path, controllers: list[str]) -> list[Path]:
    mounts = root / "sys/fs/cgroup"
    if controllers == [""]:  # version 2
        return [mounts, mounts / "unified"]
    return [mounts / ",".join(controllers), mounts / "cpu"] if "cpu" in controllers else []


def _quota(folder: Path) -> float | None:
    with suppress(OSError, ValueError, TypeError, ZeroDivisionError):
        return _share(*(folder / "cpu.max").read_text().split())
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return _share(quota, period)
    return None


def _share(quota: str, period: str = "100000") -> float | None:
    """ "max", and -1 in version 1, set none."""
    if quota == "max" or int(quota) <= 0:
        return None
    return int(quota) / int(period)
