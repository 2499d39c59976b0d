"""JD-Full, JD-Diag and SVD of one module's adapters, on the GPU beside the CPU.

    python -m infra.bench.gpu.compression

Generated adapters (collection.py), q_proj of a 7B model. Wall seconds, medians, all cores of the CPU. Both devices do
all of the work from the same stack, the transfer not counted; ``apart`` is the largest difference between the errors of
an adapter, which may not exceed 1e-5. ``share`` is that of compress.py: the time of the large products alone, each in
its fastest layout, over the time of the whole fit; of SVD there is none, its products are all small. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cluster.compression.basis import relative_errors
from cluster.compression.jd_full import leading
from cluster.compression.methods import METHODS
from cluster.compression.stack import FactorStack, stack_factors
from cluster.compression.svd import spectra, truncate_all
from infra.bench.collection import Collection, factors
from infra.bench.products import BareProducts, ProductLog, wall_seconds

APART = 1e-5
REPEATS = 3
Q_PROJ = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Way:
    """``fit`` is what is timed; ``errors`` (n,) are those of what it gave."""

    fit: Callable[[FactorStack, int], Any]
    errors: Callable[[FactorStack, int, Any], Tensor]


def _joint(method: str) -> Way:
    fit, cores = METHODS[method].fit, METHODS[method].cores
    return Way(
        lambda stack, rank: fit(stack, rank, 0),
        lambda stack, rank, basis: relative_errors(stack, basis, cores(stack, basis)),
    )


def _lost(stack: FactorStack, rank: int, _: FactorStack) -> Tensor:
    return torch.tensor([float(own[rank:].sum() / own.sum()) for own in spectra(stack)], dtype=torch.float64)


WAYS = {"jd-full": _joint("jd-full"), "jd-diag": _joint("jd-diag"), "svd": Way(truncate_all, _lost)}


def measure(stack: FactorStack, name: str, rank: int) -> tuple[dict[str, Any], Tensor]:
    """On the stack's device."""
    way, device = WAYS[name], stack.A.device.type
    stacks = [stack, *([small] if (small := leading(stack, rank)) is not None else [])]
    with ProductLog({rows.numel() for own in stacks for rows in (own.A, own.B)}) as log:
        result = way.fit(stack, rank)  # the first on a GPU loads its libraries, too
    errors = way.errors(stack, rank, result).cpu()
    bare = BareProducts(log, device, wall_seconds)
    fits, bares = [], []
    for _ in range(REPEATS):
        fits.append(wall_seconds(partial(way.fit, stack, rank))[0])
        bares.append(bare.seconds())
    seconds, alone = statistics.median(fits), statistics.median(bares)
    figures: dict[str, Any] = {"seconds": seconds, "error": float(errors.mean())}
    if log.large and name != "svd":
        figures |= {"share": alone / seconds, "product_tflops": log.large_operations / alone / 1e12}
    return figures, errors


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.gpu.compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--adapters", type=int, nargs="+", default=[256, 1000], help="default: 256 1000")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64], help="of the bases (default: 16 64)")
    parser.add_argument("--hidden", type=int, default=4096, help="d_in and d_out (default: %(default)s)")
    options = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    spec = Collection(adapters=max(options.adapters), layers=1, hidden=options.hidden, kv_width=options.hidden)
    pairs = [(i, factors(spec, i, Q_PROJ)) for i in range(spec.adapters)]
    rows = []
    for n in options.adapters:
        stack = stack_factors(pairs[:n])
        assert stack is not None
        for name in WAYS:
            for rank in options.ranks if name != "svd" else [2]:
                row: dict[str, Any] = {"way": name, "adapters": n, "rank": rank}
                errors = {}
                for device in devices:
                    row[device], errors[device] = measure(stack.to(device), name, rank)
                if "cuda" in errors:
                    row["apart"] = float((errors["cuda"] - errors["cpu"]).abs().max())
                    row["times_faster"] = row["cpu"]["seconds"] / row["cuda"]["seconds"]
                rows.append(row)
                print(json.dumps(row), flush=True)
    agree = all(row.get("apart", 0) <= APART for row in rows)
    print(json.dumps({"hidden": options.hidden, "within": APART, "agree": agree, "rows": rows}))


if __name__ == "__main__":
    main()
