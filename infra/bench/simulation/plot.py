"""The simulation's plot: requests, devices and P99 latency over time, as an SVG file."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from infra.bench.simulation.fleet import TICK_S, Outcome

# Okabe and Ito's colours; no two ways have the same line.
SWAPPING_LINE = ("#D55E00", "--")
LINES = [("#0072B2", "-"), ("#009E73", "-."), ("#56B4E9", ":"), ("#8F4D75", "-"), ("#6b7177", (0, (5, 1)))]
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "compress-then-serve", "font.size": 9, "legend.frameon": False}
WINDOW_S = 120.0


def draw(outcomes: Mapping[str, Outcome]) -> str:
    """The same outcomes give the same text."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 6), layout="constrained")
        asked, devices, latency = figure.subplots(3, sharex=True)
        end = max(float(outcome.came_at[-1]) for outcome in outcomes.values())
        edges = np.arange(0, end + WINDOW_S, WINDOW_S)
        middles = (edges[:-1] + WINDOW_S / 2) / 60
        first = next(iter(outcomes.values()))
        asked.step(middles, np.histogram(first.came_at, edges)[0] / WINDOW_S, where="mid", color="#1b1f24")
        lines = itertools.cycle(LINES)
        for way, outcome in outcomes.items():
            color, line = SWAPPING_LINE if way == "swapping" else next(lines)
            ticks = np.arange(1, len(outcome.devices) + 1) * TICK_S / 60
            devices.step(ticks, outcome.devices, linestyle=line, where="post", color=color, label=way)
            window = np.digitize(outcome.came_at, edges) - 1
            tails = [outcome.latencies_s[window == index] for index in range(len(middles))]
            p99 = [np.percentile(tail, 99) if len(tail) else np.nan for tail in tails]
            latency.plot(middles, p99, linestyle=line, color=color)
        asked.set_ylabel("requests/s")
        devices.set_ylabel("devices")
        latency.set_ylabel(f"P99 of {WINDOW_S:.0f} s, s")
        latency.set_yscale("log")
        latency.set_xlabel("minutes")
        figure.legend(ncols=len(outcomes), loc="outside upper center", fontsize=8)
        for axes in (asked, devices, latency):
            axes.grid(color="#e3e5e8")
            axes.set_axisbelow(True)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
