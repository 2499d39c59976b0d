"""From runs to figures: medians, spreads, and ratios with the interval they are known to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infra.bench.serving.load import Run


@dataclass(frozen=True)
class Ratio:
    """``median`` of paired ratios; ``low`` and ``high`` bound it with at least 95% confidence, or are the least and the
    largest where there are too few pairs for that (fewer than 6)."""

    median: float
    low: float
    high: float


def paired_ratio(own: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Of runs in the same round. The interval is by order statistics, for any distribution: the k-th smallest and
    largest of n bound the median with probability 1 - 2 P(Binomial(n, 1/2) < k)."""
    ratios = sorted(a / b for a, b in zip(own, baseline, strict=True))
    n, k, outside = len(ratios), 1, 2.0 ** -len(ratios)
    while 2 * (outside + math.comb(n, k) / 2**n) <= 0.05:
        outside += math.comb(n, k) / 2**n
        k += 1
    return Ratio(statistics.median(ratios), ratios[k - 1], ratios[n - k])


def summarize(runs: Sequence[Run]) -> dict[str, float]:
    """Medians over the runs of what is counted a run; means and percentiles over all their answers. Milliseconds."""
    rates = [run.requests_per_s for run in runs]
    first = np.concatenate([run.first_token_s for run in runs]) * 1e3
    each = np.concatenate([run.each_token_s for run in runs]) * 1e3
    return {
        "requests_per_s": statistics.median(rates),
        "requests_per_s_min": min(rates),
        "requests_per_s_max": max(rates),
        "tokens_per_s": statistics.median(run.tokens_per_s for run in runs),
        "first_token_ms_mean": float(first.mean()),
        "first_token_ms_median": float(np.median(first)),
        "first_token_ms_p99": float(np.percentile(first, 99)),
        "each_token_ms_mean": float(each.mean()),
        "each_token_ms_p99": float(np.percentile(each, 99)),
    }
