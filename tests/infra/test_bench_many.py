"""The benchmark of many adapters: what it counts, and that what it prints is of the commands it ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from infra.bench.many import read_counters
from tests.support.paths import REPOSITORY

PAGE = """\
# TYPE SeaweedFS_s3_request_total counter
SeaweedFS_s3_request_total{bucket="",code="403",type="LIST"} 1
SeaweedFS_s3_request_total{bucket="bench",code="200",type="GET"} 40
SeaweedFS_s3_request_total{bucket="bench",code="206",type="GET"} 1.2e+06
SeaweedFS_s3_request_total{bucket="bench",code="200",type="PUT"} 3
SeaweedFS_s3_request_total{bucket="bench-2",code="200",type="PUT"} 9
SeaweedFS_s3_bucket_traffic_sent_bytes_total{bucket="bench"} 5.0e+09
"""


def test_requests_of_one_bucket_are_summed_over_their_status() -> None:
    assert read_counters(PAGE, "bench") == {"GET": 1_200_040, "PUT": 3, "bytes": 5_000_000_000}
    assert read_counters(PAGE, "none") == {"bytes": 0}


@pytest.mark.by_hand
@pytest.mark.slow
def test_every_command_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    size = ["--hidden", "64", "--kv-width", "32", "--rank", "4", "--clusters", "2", "--basis-rank", "8"]
    line = [sys.executable, "-m", "infra.bench.many", "--adapters", "12", *size, "--folder", str(tmp_path)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    [result] = json.loads(done.stdout.splitlines()[-1])["results"]
    for command in ("plan", "run", "add", "show"):
        assert result[command]["cpu_seconds"] > 0
        assert result[command]["driver_bytes"] > 0
    assert result["run"]["task_bytes"] > 0
    assert 0 < result["error"] < 1
    assert result["adapters_bytes"] > result["objects_bytes"] > 0
    assert not list(tmp_path.iterdir())
