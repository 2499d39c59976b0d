"""What the rounds gave, row by row: figures, ratios to the baselines, and the table that is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from infra.bench.serving.figures import paired_ratio, summarize
from infra.bench.serving.load import Row, Run

BASELINES = ("a", "b", "e@1", "c", "d", "ha")
Runs = dict[str, dict[tuple[int, int], Run]]
"""Row -> (its group, round) -> run."""


def describe_row(row: Row, runs: Runs) -> dict[str, Any]:
    """Ratios are of requests/s, over the rounds that both rows were in."""
    own = runs[row.name]
    entry: dict[str, Any] = {"row": row.name, "rounds": len(own)}
    entry |= {name: round(value, 2) for name, value in summarize(list(own.values())).items()}
    entry |= {"resident_bytes": row.resident_bytes, "start_s": round(row.start_s, 1)}
    for baseline in BASELINES:
        shared = [key for key in own if key in runs.get(baseline, {})]
        if shared:
            ratio = paired_ratio(
                [own[key].requests_per_s for key in shared], [runs[baseline][key].requests_per_s for key in shared]
            )
            entry[f"to_{baseline}"] = [round(value, 3) for value in dataclasses.astuple(ratio)]
    return entry


def print_table(results: Sequence[dict[str, Any]]) -> None:
    print(
        f"{'row':<5} {'requests/s':>20} {'tokens/s':>9} {'first token, ms':>18} {'each token, ms':>16} "
        f"{'resident':>10} {'start, s':>8}  ratio to a, to b"
    )
    print(f"{'':<5} {'':>20} {'':>9} {'mean / P99':>18} {'mean / P99':>16} {'MB':>10}")
    for entry in results:
        rate = f"{entry['requests_per_s']:.1f} [{entry['requests_per_s_min']:.1f}, {entry['requests_per_s_max']:.1f}]"
        first = f"{entry['first_token_ms_mean']:.0f} / {entry['first_token_ms_p99']:.0f}"
        each = f"{entry['each_token_ms_mean']:.1f} / {entry['each_token_ms_p99']:.1f}"
        ratios = "  ".join("{:.2f} [{:.2f}, {:.2f}]".format(*entry[name]) for name in ("to_a", "to_b") if name in entry)
        print(
            f"{entry['row']:<5} {rate:>20} {entry['tokens_per_s']:>9.0f} {first:>18} {each:>16} "
            f"{entry['resident_bytes'] / 1e6:>10.1f} {entry['start_s']:>8.1f}  {ratios}",
            flush=True,
        )
