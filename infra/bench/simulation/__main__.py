"""A simulated fleet: many adapters in clusters on a few devices, beside replicas that swap adapters. No Ray, no model.

    python -m infra.bench.simulation --out infra/bench/results/simulation.json --plot infra/bench/results/simulation.svg

``--adapters`` adapters, asked with Poisson arrivals whose rate goes from ``--quiet`` to ``--peak`` requests a second
and back, by zipf; ``--clusters`` clusters of equal size, drawn at random. Ways to serve them on ``--devices`` devices:

    N groups   for each N of ``--groups``: the clusters packed into so many. One has 1 replica at least; several go to
               zero
    swapping   every replica takes any adapter whole, into one of ``--slots`` slots, the least recently used one goes;
               1 replica at least

All decide by serve_app.autoscaling.share_devices every 10 seconds on a mean of 30, with Serve's delays. A replica is
chosen as Serve does: of two drawn at random the less busy one.

The cost model is of one machine, SmolLM2-135M on 2 CPUs (infra/bench/results/serving-1024.json and
serving-one-client.json): a request among n in a batch takes A + B n seconds, by row he (over HTTP, 1 and 32 clients);
whole adapters make that 1 / 0.70 of it (rows d and e25); a swap stops its replica for ``--swap-ms``, by default what
row c takes longer than row d, by miss; a start takes row he's ``start_s``. Before anything else the model is put beside
what it was not fitted to. Cost is device seconds, from when a device is given until it is free. Last line: JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from infra.bench.simulation.costs import measured_costs, rows
from infra.bench.simulation.fleet import Group, Outcome, Replica, simulate

SWAPPING = "swapping"


def zipf_choice(rng: np.random.Generator, num_adapters: int, exponent: float, size: int) -> np.ndarray:
    weights = np.arange(1, num_adapters + 1, dtype=float) ** -exponent
    return rng.choice(num_adapters, size, p=weights / weights.sum())


def make_requests(parsed: argparse.Namespace) -> list[tuple[float, int]]:
    """A raised cosine from quiet to peak and back, by thinning (Lewis and Shedler 1979)."""
    rng = np.random.default_rng(parsed.seed)
    length_s = 3600 * parsed.hours
    times = np.cumsum(rng.exponential(1 / parsed.peak, int(1.2 * parsed.peak * length_s)))
    times = times[times < length_s]
    rate = parsed.quiet + (parsed.peak - parsed.quiet) * (1 - np.cos(2 * np.pi * times / length_s)) / 2
    times = times[rng.uniform(0, parsed.peak, len(times)) < rate]
    return list(zip(times.tolist(), zipf_choice(rng, parsed.adapters, parsed.zipf, len(times)).tolist(), strict=True))


def run_way(way: str, requests: list[tuple[float, int]], parsed: argparse.Namespace) -> Outcome:
    ours, swapping = measured_costs(parsed.swap_ms)
    clusters = np.random.default_rng(parsed.seed + 1).permutation(parsed.adapters) % parsed.clusters
    num_groups = 1 if way == SWAPPING else int(way.split()[0])
    costs, slots = (swapping, parsed.slots) if way == SWAPPING else (ours, None)
    least = 0 if num_groups > 1 else 1
    groups = [Group(least, parsed.devices, least) for _ in range(num_groups)]
    groups[0].replicas += [Replica(costs, slots)] * least
    group_of = (clusters % num_groups).tolist().__getitem__
    return simulate(requests, group_of, groups, parsed.devices, costs, slots, parsed.seed)


def beside_what_was_measured(seed: int) -> dict[str, dict[str, float]]:
    """Requests a second of one replica that 32 clients keep busy: what the costs were not taken from."""
    checks = {}
    rng = np.random.default_rng(seed)
    ours, swapping = measured_costs(None)
    over_http = rows("serving-1024")["he", "uniform"]["requests_per_s"]
    inside = rows("serving-1024")["e25", "uniform"]["requests_per_s"]
    for row, popularity, costs, slots in (("he", "zipf", ours, None), ("c", "zipf", swapping, 86)):
        replica, now = Replica(costs, slots), 0.0
        asked = iter(zipf_choice(rng, 1024, 1.5, 20_000).tolist())
        for adapter in itertools.islice(asked, 32):
            replica.add(now, now, adapter)
        finished = 0
        for adapter in asked:
            now = replica.next_ready()
            finished += len(replica.take_ready(now))
            while replica.ongoing < 32:
                replica.add(now, now, adapter)
        measured = rows("serving-1024")[row, popularity]["requests_per_s"]
        # Row c was not measured over HTTP: by what that takes off ours.
        measured *= over_http / inside if row == "c" else 1
        checks[f"{row}, {popularity}"] = {"simulated": round(finished / now, 1), "measured": round(measured, 1)}
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in (("adapters", 10_000), ("clusters", 200), ("devices", 8), ("slots", 86)):
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"(default: {default})")
    for name, value in (("zipf", 1.0), ("hours", 2.0), ("quiet", 0.05), ("peak", 80.0)):
        parser.add_argument(f"--{name}", metavar="X", type=float, default=value, help=f"(default: {value})")
    parser.add_argument("--groups", metavar="N", type=int, nargs="+", default=[1, 2, 4, 8, 200])
    parser.add_argument("--swap-ms", metavar="MS", type=float, help="(default: as measured)")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--out", metavar="FILE", type=Path, help="the last line, to a file too")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="an SVG")
    parsed = parser.parse_args()
    requests = make_requests(parsed)
    checks = beside_what_was_measured(parsed.seed)
    print(f"{len(requests)} requests; the model beside what was measured, requests/s: {checks}\n", flush=True)
    figures, outcomes = {}, {}
    for way in [*(f"{number} groups" for number in parsed.groups), SWAPPING]:
        outcomes[way] = run_way(way, requests, parsed)
        figures[way] = outcomes[way].figures()
        print(f"{way:10} {figures[way]}", flush=True)
    options = {name: value for name, value in vars(parsed).items() if name not in ("out", "plot")}
    line = json.dumps({**options, "requests": len(requests), "checks": checks, "ways": figures})
    if parsed.out:
        parsed.out.write_text(line + "\n")
    if parsed.plot:
        from infra.bench.simulation.plot import draw  # matplotlib is slow to import, and --help should not be

        parsed.plot.write_text(draw(outcomes))
    print(line)


if __name__ == "__main__":
    main()
