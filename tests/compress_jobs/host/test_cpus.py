"""CPUs follow the process's affinity and its cgroup's quota, in both versions of cgroups, and not the host's cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress_jobs.__main__ import main
from compress_jobs.host.cpus import available_cpus
from tests.support.place import Place

ALL = len(os.sched_getaffinity(0))


def machine(root: Path, cgroup: str, **quotas: str) -> Path:
    """A file system with this /proc/self/cgroup, and files below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in quotas.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "quotas", "expected"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),  # a fifth of one is one
        ("0::/a.slice/job\n", {"a.slice/cpu.max": "50000 100000\n", "a.slice/job/cpu.max": "max 100000\n"}, 1),
        ("0::/not/mounted/here\n", {"cpu.max": "100000 100000\n"}, 1),  # a container without a namespace of its own
        ("2:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "90000", "cpu,cpuacct/cpu.cfs_period_us": "90000"}, 1),
        ("1:cpu:/x\n0::/\n", {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"}, 1),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALL),
        ("4:memory:/x\n", {}, ALL),
        ("0::/\n", {"cpu.max": "nonsense"}, ALL),
        ("", {}, ALL),
    ],
)
def test_a_quota_of_the_cgroup_or_of_one_above_it_counts(
    tmp_path: Path, cgroup: str, quotas: dict[str, str], expected: int
) -> None:
    assert available_cpus(machine(tmp_path, cgroup, **quotas)) == min(expected, ALL)


def test_a_machine_without_cgroups_gives_what_the_affinity_has(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == ALL


@pytest.mark.slow
@pytest.mark.skipif(ALL < 2, reason="one CPU")
def test_plan_and_workers_keep_to_the_affinity(place: Place) -> None:
    one = str(min(os.sched_getaffinity(0)))
    plan = ["plan", "--adapters", str(place.adapters), "--base", str(place.base), "--device-memory", "1GiB"]
    command = ["taskset", "-c", one, sys.executable, "-m", "compress_jobs"]
    done = subprocess.run([*command, *plan], capture_output=True, text=True, check=True)
    assert "on 1 CPUs" in done.stdout
    count = (
        "import ray; from compress_jobs.job.options import RunOptions; "
        "from compress_jobs.job.ray_cluster import connect; "
        "connect(RunOptions(adapters='a', base='b', out='c')); print(ray.cluster_resources()['CPU'])"
    )
    done = subprocess.run(
        ["taskset", "-c", one, sys.executable, "-c", count], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1.0"]


def test_a_number_of_cpus_that_is_given_is_taken(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["--adapters", str(place.adapters), "--base", str(place.base)]
    assert main(["plan", *source, "--device-memory", "1GiB", "--num-cpus", "7"]) == 0
    assert "on 7 CPUs" in capsys.readouterr().out
