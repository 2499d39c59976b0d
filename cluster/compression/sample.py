"""A few modules that stand for all: what adapters are clustered by, and errors estimated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cluster.adapters.record import AdapterRecord
from cluster.compression.stack import FactorStack

MANY = 256
"""From so many adapters on a sample has one module of every kind, and adapters are clustered by leading.py."""


@dataclass(frozen=True)
class Sample:
    """Stacks of the sampled modules, and what each stands for in each adapter's error: weights (N, modules)
    whose rows sum to 1, 0 where it does not touch the module."""

    stacks: tuple[FactorStack, ...]
    weights: NDArray[np.float64]

    @staticmethod
    def of(
        stacks: Mapping[str, FactorStack],
        num_adapters: int,
        kind_energies: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> Sample:
        """``kind_energies``: kind of module -> the adapters' energy in all modules of that kind (N,). With it a
        module stands for its kind, so that the sample's errors estimate those over all modules; without, each
        stands for itself."""
        energies = np.zeros((num_adapters, len(stacks)))
        for m, stack in enumerate(stacks.values()):
            energies[list(stack.members), m] = stack.norms.square().numpy()
        if kind_energies is not None:
            kinds = np.array([kind_of(module) for module in stacks])
            for kind in np.unique(kinds):
                of_kind = energies[:, kinds == kind]
                scale = _divide(kind_energies[str(kind)][:, None], of_kind.sum(1, keepdims=True))
                energies[:, kinds == kind] = of_kind * scale
        return Sample(tuple(stacks.values()), _divide(energies, energies.sum(1, keepdims=True)))

    @property
    def num_adapters(self) -> int:
        return len(self.weights)

    def select(self, adapters: Sequence[int]) -> Sample:
        """The sample of ``adapters`` alone, renumbered 0, 1, ..."""
        new_number = {adapter: number for number, adapter in enumerate(adapters)}
        stacks, kept = [], []
        for m, stack in enumerate(self.stacks):
            positions = [i for i, member in enumerate(stack.members) if member in new_number]
            if positions:
                own = stack.select(positions)
                stacks.append(replace(own, members=tuple(new_number[member] for member in own.members)))
                kept.append(m)
        return Sample(tuple(stacks), self.weights[np.ix_(list(adapters), kept)])


def sample_modules(modules: list[str], per_kind: int = 3) -> list[str]:
    """A few modules of every kind, spread over the depth of the model.

    A kind is a module's name without its layer's number; ``modules`` in the model's order.
    """
    kinds: dict[str, list[str]] = {}
    for module in modules:
        kinds.setdefault(kind_of(module), []).append(module)
    chosen = []
    for of_kind in kinds.values():
        count = min(per_kind, len(of_kind))
        chosen += [of_kind[(2 * i + 1) * len(of_kind) // (2 * count)] for i in range(count)]
    return chosen


def kind_energies(records: Sequence[AdapterRecord]) -> dict[str, NDArray[np.float64]]:
    """Kind of module -> the adapters' energies in all modules of that kind (N,)."""
    energies: dict[str, NDArray[np.float64]] = {}
    for i, record in enumerate(records):
        for module, places in record.modules.items():
            energies.setdefault(kind_of(module), np.zeros(len(records)))[i] += places.energy
    return energies


def kind_of(module: str) -> str:
    """``model.layers.7.self_attn.q_proj`` -> ``model.layers.*.self_attn.q_proj``"""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """0 where the denominator is."""
    out = np.zeros(np.broadcast(numerator, denominator).shape)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out
