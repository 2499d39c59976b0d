"""The study of weights: what each of the two weightings makes small, by a dense computation."""

from __future__ import annotations

import numpy as np
import torch

from cluster.compression.methods import METHODS
from cluster.compression.stack import stack_factors
from compress_jobs.quality.collection import Collection, compress_jointly
from infra.bench.normalisation import by_adapter
from tests.support.dense import dense, random_adapters


def unlike_modules() -> Collection:
    """Eight adapters, half of them with nearly all their energy at q, half at v."""
    modules = {m: random_adapters([2] * 8, 24, 30, seed=seed) for m, seed in (("q", 1), ("v", 2))}
    adapters = {}
    for i in range(8):
        scales = {"q": 3.0, "v": 0.3} if i % 2 else {"q": 0.3, "v": 3.0}
        adapters[f"a{i}"] = {m: (modules[m][i][0], modules[m][i][1] * scales[m]) for m in modules}
    stacks = {m: stack_factors([(i, own[m]) for i, own in enumerate(adapters.values())]) for m in modules}
    return Collection(adapters, {m: stack for m, stack in stacks.items() if stack is not None})


def test_each_weighting_is_the_better_one_by_its_own_error() -> None:
    collection = unlike_modules()
    labels = np.zeros(8, dtype=np.int64)
    unweighted, weighted = {}, {}
    for name, method in (("module", METHODS["jd-full"]), ("adapter", by_adapter(collection))):
        compressed = compress_jointly(collection, labels, method, rank=4, seed=0)
        relative, whole = [], []
        for adapter_id, own in collection.adapters.items():
            lost = {m: np.square(dense(own[m]) - dense(compressed.factors[adapter_id][m])).sum().item() for m in own}
            total = {m: np.square(dense(own[m])).sum().item() for m in own}
            relative += [lost[m] / total[m] for m in own]
            whole.append(sum(lost.values()) / sum(total.values()))
        unweighted[name], weighted[name] = np.mean(relative), np.mean(whole)
        np.testing.assert_allclose(whole, list(compressed.errors.values()), rtol=1e-5)
    assert unweighted["module"] < unweighted["adapter"]
    assert weighted["adapter"] < 0.9 * weighted["module"]


def test_both_are_lossless_at_full_rank() -> None:
    collection = unlike_modules()
    compressed = compress_jointly(collection, np.zeros(8, dtype=np.int64), by_adapter(collection), rank=16, seed=0)
    assert max(compressed.errors.values()) < 1e-3  # bfloat16
    assert all(torch.isfinite(B).all() for own in compressed.factors.values() for _, B in own.values())
