"""The joint methods behind one signature: fit a basis to a stack, then the best core of each adapter on a basis.

    basis = METHODS["jd-full"].fit(stack, rank, seed)
    cores = METHODS["jd-full"].cores(stack, basis)        # (n, r_U, r_V), or (n, r) where cores are diagonal

``cores`` takes any basis: the one just fitted, one that storage has rounded, or one that was fitted without
these adapters. How good they are on it is ``basis.relative_errors``, whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from cluster.compression.basis import Basis, unit_cores
from cluster.compression.jd_diag import diagonal_cores, jd_diag
from cluster.compression.jd_full import jd_full
from cluster.compression.stack import FactorStack


@dataclass(frozen=True)
class JointMethod:
    fit: Callable[[FactorStack, int, int], Basis]
    cores: Callable[[FactorStack, Basis], Tensor]


METHODS: Mapping[str, JointMethod] = MappingProxyType(
    {"jd-full": JointMethod(jd_full, unit_cores), "jd-diag": JointMethod(jd_diag, diagonal_cores)}
)
