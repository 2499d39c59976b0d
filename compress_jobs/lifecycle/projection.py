"""An adapter on bases that were fitted without it: its best cores there, and what they leave of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.adapters.factors import Factors, factored_energy
from cluster.compression.basis import Basis, relative_errors
from cluster.compression.methods import METHODS
from cluster.compression.stack import stack_factors


@dataclass(frozen=True)
class Projection:
    """``cores``: module -> (r_U, r_V) or (r,), as they will be stored. ``squared_errors``: module -> ||M - M^||^2
    of those cores, for every module in which the adapter is not zero."""

    cluster: str
    cores: dict[str, Tensor]
    squared_errors: dict[str, float]

    @property
    def lost(self) -> float:
        return sum(self.squared_errors.values())


def project(
    method: str, factors: Mapping[str, Factors], bases: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype
) -> Projection | None:
    """The adapter on the cluster that captures most of it: argmin_c sum_m ||M - U_c S V_c^T||^2, S the method's
    best cores on c's stored basis, rounded to ``dtype``. None where there is no cluster.

    ``bases``: cluster -> ``<module>.U`` (d_out, r_U), ``<module>.V`` (d_in, r_V) as stored. A module that a
    cluster has no basis for is lost there, whole.
    """
    stacks = {module: stack for module, pair in factors.items() if (stack := stack_factors([(0, pair)])) is not None}
    best: Projection | None = None
    for cluster, basis in bases.items():
        found = Projection(cluster, {}, {})
        for module, stack in stacks.items():
            if f"{module}.U" not in basis:
                found.squared_errors[module] = factored_energy(*factors[module])
                continue
            stored = Basis(basis[f"{module}.U"].float(), basis[f"{module}.V"].float())
            unit = METHODS[method].cores(stack, stored)
            norms = stack.norms.view(-1, *[1] * (unit.dim() - 1))
            cores = (unit * norms).to(dtype)
            relative = relative_errors(stack, stored, cores / norms)
            found.cores[module] = cores[0]
            found.squared_errors[module] = float(relative[0] * stack.norms[0].square())
        if best is None or found.lost < best.lost:
            best = found
    return best
