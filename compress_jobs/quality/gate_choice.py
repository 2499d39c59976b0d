"""Which gate keeps what is asked for: a sample of adapters, each judged as every gate would have it served."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LEVELS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""Gates that are tried. Steps no finer than a handful of adapters can tell apart."""
PAPER = 0.6
"""The mean error up to which the paper's adapters kept 99% of Rouge-L (arXiv 2407.00066, section 6.5)."""
NUM_SAMPLED, NUM_ROWS = 8, 32
# No sampled adapter may lose more than so many times what all of them may lose in the mean.
_WORST = 5
BASIS = "basis"
NOTHING = 1e-4
"""In nats a token: an adapter that gains less over the base has nothing that could be kept."""


@dataclass(frozen=True)
class Served:
    """One way to serve an adapter: ``BASIS``, "rank 2" or "whole". ``kept``: its share of what the uncompressed adapter
    gains over the base, 1 and more being all of it; ``agreement``: see probe.py, None where it was not asked for."""

    how: str
    error: float
    kept: float
    agreement: float | None = None


@dataclass(frozen=True)
class Judged:
    """A sampled adapter: the ways to serve it, and the one (its index) that each gate of ``LEVELS`` leads to."""

    adapter_id: str
    ways: tuple[Served, ...]
    by_level: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """What the sampled adapters keep where the gate is ``gate``, and how many of them are on a basis then.
    ``at_least``: what all adapters keep in the mean, two standard errors below the sample's."""

    gate: float
    kept: float
    at_least: float
    worst: float
    worst_adapter: str
    on_basis: int


def levels(judged: Sequence[Judged], num_adapters: int) -> list[Level]:
    """Ascending. What is kept beyond all counts as all: it must not make up for another's loss. ``num_adapters``: of
    whom those judged are a sample."""
    found = []
    for index, gate in enumerate(LEVELS):
        served = {one.adapter_id: one.ways[one.by_level[index]] for one in judged}
        kept = {adapter_id: min(way.kept, 1.0) for adapter_id, way in served.items()}
        worst = min(kept, key=lambda adapter_id: kept[adapter_id])
        on_basis = sum(way.how == BASIS for way in served.values())
        mean, error = _mean_and_error(list(kept.values()), num_adapters)
        found.append(Level(gate, mean, mean - 2 * error, kept[worst], worst, on_basis))
    return found


def _mean_and_error(kept: Sequence[float], num_adapters: int) -> tuple[float, float]:
    """The mean and its standard error, of a sample drawn without replacement; of a single one its own distance to 1."""
    mean = math.fsum(kept) / len(kept)
    spread = statistics.stdev(kept) if len(kept) > 1 else 1 - mean
    return mean, spread / math.sqrt(len(kept)) * math.sqrt(max(0.0, 1 - len(kept) / num_adapters))


def choose_gate(
    judged: Sequence[Judged], errors: Iterable[float], keep: float, num_adapters: int
) -> tuple[Level, list[Level]]:
    """The gate, and all levels. It is the largest that keeps ``keep`` in the mean of all ``num_adapters``, as far as
    the sample can tell, and of nobody in it less than five times as far from all; the smallest where none does.

    ``errors``: of the collection's adapters on their bases. Where nobody's error is near that gate, the smallest is
    taken that serves everybody alike: no later adapter is to be let through at an error that nobody was judged at.
    """
    found = levels(judged, num_adapters)
    enough = [level for level in found if level.at_least >= keep and 1 - level.worst <= _WORST * (1 - keep)]
    largest = (enough or found[:1])[-1]
    index = found.index(largest)
    seen = [error for error in errors if error <= largest.gate]
    seen += [one.ways[one.by_level[index]].error for one in judged]
    return next(level for level in found if level.gate >= min(max(seen), largest.gate)), found
