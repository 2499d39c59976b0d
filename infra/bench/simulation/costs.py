"""What a request, a start and a swap cost, by what was measured here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"


@dataclass(frozen=True)
class Costs:
    """A request among n takes ``alone_s`` + ``each_s`` n seconds; ``start_s`` is a replica's."""

    alone_s: float
    each_s: float
    start_s: float
    swap_s: float = 0.0

    def request_s(self, num_running: int) -> float:
        return self.alone_s + self.each_s * num_running


def measured_costs(swap_ms: float | None) -> tuple[Costs, Costs]:
    """Of our replicas, and of those that swap."""
    many, one = rows("serving-1024"), rows("serving-one-client")
    request_1, request_32 = 1 / one["he", "uniform"]["requests_per_s"], 32 / many["he", "uniform"]["requests_per_s"]
    each = (request_32 - request_1) / 31
    ours = Costs(request_1 - each, each, many["he", "uniform"]["start_s"])
    rate = {row: many[row, "uniform"]["requests_per_s"] for row in ("c", "d", "e25")}
    slower = rate["e25"] / rate["d"]
    missed = 1 - 86 / 1024  # uniform, 86 slots
    swap_s = (1 / rate["c"] - 1 / rate["d"]) / missed if swap_ms is None else swap_ms / 1000
    return ours, Costs(ours.alone_s * slower, ours.each_s * slower, ours.start_s, swap_s)


def rows(name: str) -> dict[tuple[str, str], dict[str, Any]]:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    return {(row["row"], row["popularity"]): row for row in document["results"]}
