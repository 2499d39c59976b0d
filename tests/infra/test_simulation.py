"""The simulated fleet: what must hold of it whatever the figures are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from infra.bench.simulation.costs import Costs
from infra.bench.simulation.fleet import BATCH, Group, Outcome, Replica, simulate
from tests.support.paths import REPOSITORY

COSTS = Costs(alone_s=0.2, each_s=0.05, start_s=30.0, swap_s=0.5)


def requests(rate: float, length_s: float, num_adapters: int, seed: int) -> list[tuple[float, int]]:
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, int(rate * length_s)))
    return list(zip(times.tolist(), rng.integers(0, num_adapters, len(times)).tolist(), strict=True))


def run(num_groups: int, devices: int, rate: float, seed: int = 0, slots: int | None = None) -> Outcome:
    asked = requests(rate, 600, 40, seed)
    groups = [Group(0, devices, 0) for _ in range(num_groups)]
    return simulate(asked, lambda adapter: adapter % num_groups, groups, devices, COSTS, slots, seed)


@pytest.mark.parametrize(("num_groups", "devices", "rate"), [(1, 1, 1.0), (3, 4, 20.0), (6, 3, 5.0)])
def test_every_request_is_answered_and_devices_given_out_are_never_more_than_there_are(
    num_groups: int, devices: int, rate: float
) -> None:
    outcome = run(num_groups, devices, rate)
    assert len(outcome.latencies_s) == int(rate * 600)
    assert outcome.latencies_s.min() >= COSTS.request_s(1) - 1e-6
    # One that ends what it has is given back first, and may still be there.
    assert np.median(outcome.devices) <= devices
    assert outcome.devices.max() <= 2 * devices
    assert outcome.swaps == 0


def test_the_same_seed_gives_the_same_and_another_another() -> None:
    first, again, other = run(3, 4, 10.0), run(3, 4, 10.0), run(3, 4, 10.0, seed=1)
    assert first.latencies_s.tolist() == again.latencies_s.tolist()
    assert first.latencies_s.tolist() != other.latencies_s.tolist()


def test_a_batch_takes_what_the_cost_model_says_and_who_waits_waits_for_it() -> None:
    replica = Replica(COSTS, None)
    for _ in range(BATCH + 1):
        replica.add(0.0, 0.0, 0)
    whole = COSTS.request_s(BATCH)
    assert replica.next_ready() == pytest.approx(whole)
    assert len(replica.take_ready(replica.next_ready())) == BATCH
    assert replica.next_ready() == pytest.approx(whole + COSTS.request_s(1))


def test_a_swap_stops_the_whole_replica_and_a_loaded_adapter_needs_none() -> None:
    replica = Replica(COSTS, slots=2)
    for adapter in (1, 2, 1):
        replica.add(0.0, 0.0, adapter)
    assert replica.swaps == 2
    assert replica.next_ready() == pytest.approx(2 * COSTS.swap_s + COSTS.request_s(3))
    replica.take_ready(replica.next_ready())
    for adapter in (3, 1, 2):  # 2 went for 3: it was used before 1
        replica.add(10.0, 10.0, adapter)
    assert replica.swaps == 4


@pytest.mark.slow
def test_the_command_prints_its_figures_and_draws_them(tmp_path: Path) -> None:
    line = [
        sys.executable,
        "-m",
        "infra.bench.simulation",
        "--adapters",
        "100",
        "--clusters",
        "4",
        "--groups",
        "1",
        "2",
    ]
    line += ["--devices", "2", "--hours", "0.1", "--peak", "5", "--plot", str(tmp_path / "plot.svg")]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])["ways"]) == {"1 groups", "2 groups", "swapping"}
    assert (tmp_path / "plot.svg").read_text().count("<svg") == 1
