"""Clustering by leading singular values: what is kept of an adapter, and who is captured by whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cluster.compression.balanced import random_balanced
from cluster.compression.basis import captured_energy
from cluster.compression.jd_full import jd_full
from cluster.compression.leading import Leading, add_captured, fit_leading, halves_of, values_needed
from cluster.compression.stack import stack_factors
from tests.support.dense import Factors, dense, random_adapters

D_OUT, D_IN, N = 40, 60, 12
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def adapters() -> list[Factors]:
    return random_adapters([1, 2, 3, 4, 5, 6] * 2, D_OUT, D_IN, seed=1)


def kept(adapters: list[Factors], rank: int, weights: np.ndarray) -> Leading:
    parts = []
    for number, own in enumerate(adapters):
        stack = stack_factors([(0, own)])
        assert stack is not None
        parts.append(Leading.of(stack, number, weights[[number]], rank))
    return Leading.joined(parts)


def test_what_is_kept_is_each_adapter_of_norm_1_cut_to_its_largest_singular_values(adapters: list[Factors]) -> None:
    leading = kept(adapters, 3, np.ones(N))
    for A, B, own in zip(leading.A.double(), leading.B.double(), adapters, strict=True):
        U, s, V = np.linalg.svd(dense(own) / np.linalg.norm(dense(own)))
        best = (U[:, :3] * s[:3]) @ V[:3]
        assert np.abs((B.T @ A).numpy() - best).max() < 1e-3  # float16


def test_the_captured_energy_is_that_of_a_dense_computation_times_the_weight(adapters: list[Factors]) -> None:
    weights = np.linspace(0.1, 1, N)
    leading = kept(adapters, 6, weights).select(np.arange(N) % 3 > 0)
    basis = fit_leading(leading, 3, 0)
    gains = np.zeros((N, 2))
    add_captured(gains, leading, {1: basis})
    for i, own in enumerate(adapters):
        M = dense(own) / np.linalg.norm(dense(own))
        inner = basis.U.double().numpy().T @ M @ basis.V.double().numpy()
        assert gains[i].tolist() == pytest.approx([0, weights[i] * np.square(inner).sum() * (i % 3 > 0)], abs=2e-3)


def test_a_fit_in_coordinates_of_the_span_captures_what_a_fit_in_all_of_space_does(adapters: list[Factors]) -> None:
    leading = kept(adapters, 2, np.ones(N))
    stack = leading.stack()
    for rank in (2, 5):
        basis, plain = fit_leading(leading, rank, 0), jd_full(stack, rank, 0)
        assert torch.allclose(basis.U.T @ basis.U, torch.eye(rank), atol=1e-5)
        captured, at_best = (float(captured_energy(stack, found).mean()) for found in (basis, plain))
        assert captured == pytest.approx(at_best, rel=5e-3)


def test_half_of_every_cluster_is_left_to_judge_the_other_half() -> None:
    labels = random_balanced(50, 7, np.random.default_rng(0))
    halves = halves_of(labels, np.random.default_rng(1))
    for cluster in range(7):
        assert abs(2 * int(halves[labels == cluster].sum()) - int((labels == cluster).sum())) <= 1


def test_half_a_cluster_has_rows_for_twice_the_rank() -> None:
    for num_adapters, clusters, rank in ((1000, 25, 16), (300, 100, 16), (1000, 7, 64)):
        assert values_needed(num_adapters, clusters, rank) * (num_adapters / clusters / 2) >= 2 * rank
    assert values_needed(10_000, 2, 16) == 2
