"""The compressed layer: what a batch of tokens, each of its own adapter, adds to a linear layer's output.

Shapes: T tokens, n slots of a home, r rank (U and V may differ in it: then a core is r_U x r_V). A **home**
holds one module's shared factors for its adapters: a cluster's basis and cores, or the factors of one
truncated or raw adapter (no cores, one slot).

The batch is grouped by home once a step (``group_tokens``), and the groups are used by every module of
every layer: each home costs two dense products around a gather of its cores, a token is never multiplied
by another home's basis, and base tokens are in no group at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster.errors import BundleError


@dataclass(frozen=True)
class ModuleShape:
    """A linear layer y = W x with W (d_out, d_in)."""

    d_out: int
    d_in: int


@dataclass(frozen=True)
class ModuleWeights:
    """One module of one home: slot s adds U S_s V^T (with ``cores`` None: U V^T)."""

    U: Tensor  # (d_out, r_U)
    V: Tensor  # (d_in, r_V)
    cores: Tensor | None  # (n, r_U, r_V), or (n, r) for diagonal cores

    def check(self, home: str, module: str, d_in: int, d_out: int) -> None:
        """Raises BundleError unless these fit each other and a linear layer of ``d_in`` features to ``d_out``."""
        r_U, r_V = self.U.shape[-1], self.V.shape[-1]
        expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("U", self.U, (d_out, r_U)), ("V", self.V, (d_in, r_V))]
        if self.cores is not None:
            n = self.cores.shape[0]
            expected.append(("cores", self.cores, (n, r_U, r_V) if self.cores.dim() == 3 else (n, r_U)))
        for part, tensor, shape in expected:
            if tuple(tensor.shape) != shape:
                raise BundleError(
                    f"home {home!r}: {part} of module {module!r} is {tuple(tensor.shape)}, expected {shape} for the "
                    "base model loaded here; serve the bundle on the base it was made for"
                )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ModuleWeights:
        cores = None if self.cores is None else self.cores.to(device, dtype)
        return ModuleWeights(self.U.to(device, dtype), self.V.to(device, dtype), cores)


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of one home: their rows in the batch (T_g,) and their slots (T_g,), both int64."""

    home: str
    rows: Tensor
    slots: Tensor


def group_tokens(
    homes: Sequence[str | None], slots: Sequence[int], lengths: Sequence[int], device: torch.device | str
) -> list[TokenGroup]:
    """Group a batch of sequences, ``lengths[i]`` tokens each, laid end to end, by their home.

    ``homes[i]`` None is a base sequence: it joins no group. O(tokens), independent of how many adapters
    or homes are resident.
    """
    rows_by_home: dict[str, list[int]] = {}
    slots_by_home: dict[str, list[int]] = {}
    start = 0
    for home, slot, length in zip(homes, slots, lengths, strict=True):
        if home is not None:
            rows_by_home.setdefault(home, []).extend(range(start, start + length))
            slots_by_home.setdefault(home, []).extend([slot] * length)
        start += length
    return [
        TokenGroup(home, torch.tensor(rows, device=device), torch.tensor(slots_by_home[home], device=device))
        for home, rows in rows_by_home.items()
    ]


def add_compressed_delta(
    out: Tensor, x: Tensor, groups: Sequence[TokenGroup], weights: Mapping[str, ModuleWeights]
) -> Tensor:
    """Semantics: for every group g and token t in it, with (U, V, S) = weights[g.home] and s = slots[t]:

        out[rows[t]] += U S_s V^T x[rows[t]]

    out (T, d_out) is changed in place and returned; x is (T, d_in); both of the weights' dtype and device.
    A home that has no entry in ``weights`` does not touch this module. Slots are trusted: they come from
    the serving map, which the manifest's checks bound by the number of cores.
    """
    for group in groups:
        module = weights.get(group.home)
        if module is None:
            continue
        h = x.index_select(0, group.rows) @ module.V  # (T_g, r)
        if module.cores is not None:
            cores = module.cores.index_select(0, group.slots)  # (T_g, r, r) or (T_g, r)
            h = h * cores if cores.dim() == 2 else torch.bmm(cores, h.unsqueeze(2)).squeeze(2)
        out.index_add_(0, group.rows, h @ module.U.T)
    return out
