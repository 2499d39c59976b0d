"""The compressed layer: what a batch of tokens, each of its own adapter, adds to a linear layer's output.

Shapes: T tokens, n slots of a home, r rank (U and V may differ in it: then a core is r_U x r_V). A **home** holds
one module's weights of its adapters: a cluster's basis and a core a slot, or the stacked factors of truncated and raw
adapters, their own U and V a slot and no cores.

The batch is grouped by home once a step (``group_tokens``), and the groups are used by every module of every layer: a
cluster costs two dense products around a gather of its cores, a stack two batched products on a gather of its rows, a
row a sequence. A token is never multiplied by another cluster's basis or another adapter's factors, and base tokens
are in no group at all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
    """One module of one home: slot s adds U S_s V^T.

    In a stack of factors, which has ``rows`` in place of cores, U_k V_k^T with k = rows[s]: m rows, the last of them
    zero, for the slots that do not touch this module. A row of a smaller rank than q is filled up with zeros.
    """

    U: Tensor  # (d_out, r_U); a stack's (m, d_out, q)
    V: Tensor  # (d_in, r_V); a stack's (m, d_in, q), V^T of each row as one piece
    cores: Tensor | None  # (n, r_U, r_V), or (n, r) for diagonal cores
    rows: Tensor | None = None  # (n,) int64

    @property
    def num_slots(self) -> int:
        own = self.cores if self.rows is None else self.rows
        assert own is not None
        return len(own)

    def check(self, home: str, module: str, d_in: int, d_out: int) -> None:
        """Raises BundleError unless these fit each other and a linear layer of ``d_in`` features to ``d_out``."""
        r_U, r_V = self.U.shape[-1], self.V.shape[-1]
        stacked = self.U.shape[:1] if self.rows is not None else ()
        expected: list[tuple[str, Tensor, tuple[int, ...]]] = [
            ("U", self.U, (*stacked, d_out, r_U)),
            ("V", self.V, (*stacked, d_in, r_V)),
        ]
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
        if self.rows is not None:
            V_T = self.V.mT.to(device, dtype).contiguous()
            return ModuleWeights(self.U.to(device, dtype).contiguous(), V_T.mT, None, self.rows.to(device))
        cores = None if self.cores is None else self.cores.to(device, dtype)
        return ModuleWeights(self.U.to(device, dtype), self.V.to(device, dtype), cores)


@dataclass(frozen=True)
class TokenGroup:
    """The tokens of one home: their rows in the batch (T_g,) and their slots (T_g,), both int64.

    Each ``length`` of them, one after the other, are of one slot.
    """

    home: str
    rows: Tensor
    slots: Tensor
    length: int = 1


def group_tokens(
    homes: Sequence[str | None], slots: Sequence[int], lengths: Sequence[int], device: torch.device | str
) -> list[TokenGroup]:
    """Group a batch of sequences, ``lengths[i]`` tokens each, laid end to end, by their home.

    ``homes[i]`` None is a base sequence: it joins no group. O(tokens), independent of how many adapters
    or homes are resident.
    """
    rows_by_home: dict[str, list[int]] = {}
    slots_by_home: dict[str, list[int]] = {}
    lengths_by_home: dict[str, set[int]] = {}
    start = 0
    for home, slot, length in zip(homes, slots, lengths, strict=True):
        if home is not None:
            rows_by_home.setdefault(home, []).extend(range(start, start + length))
            slots_by_home.setdefault(home, []).extend([slot] * length)
            lengths_by_home.setdefault(home, set()).add(length)
        start += length
    return [
        TokenGroup(
            home,
            torch.tensor(rows, device=device),
            torch.tensor(slots_by_home[home], device=device),
            _common_length(lengths_by_home[home]),
        )
        for home, rows in rows_by_home.items()
    ]


def _common_length(lengths: Collection[int]) -> int:
    # Of sequences of several lengths each token is its own: right, if not cheap. An engine pads them to one.
    return next(iter(lengths)) if len(lengths) == 1 else 1


def add_compressed_delta(
    out: Tensor, x: Tensor, groups: Sequence[TokenGroup], weights: Mapping[str, ModuleWeights]
) -> Tensor:
    """Semantics: for every group g and token t in it, with (U, V, S) = weights[g.home] and s = slots[t]:

        out[rows[t]] += U S_s V^T x[rows[t]]

    (a stack of factors: its U_k V_k^T, k the slot's row).
    out (T, d_out) is changed in place and returned; x is (T, d_in); both of the weights' dtype and device.
    A home that has no entry in ``weights`` does not touch this module. Slots are trusted: they come from
    the serving map, which the manifest's checks bound by the number of cores.
    """
    for group in groups:
        module = weights.get(group.home)
        if module is None:
            continue
        own = x.index_select(0, group.rows)  # (T_g, d_in)
        delta = _by_factors(own, group, module) if module.rows is not None else _by_cores(own, group, module)
        out.index_add_(0, group.rows, delta)
    return out


def _by_cores(x: Tensor, group: TokenGroup, module: ModuleWeights) -> Tensor:
    assert module.cores is not None
    h = x @ module.V  # (T_g, r)
    cores = module.cores.index_select(0, group.slots)  # (T_g, r, r) or (T_g, r)
    h = h * cores if cores.dim() == 2 else torch.bmm(cores, h.unsqueeze(2)).squeeze(2)
    return h @ module.U.T


def _by_factors(x: Tensor, group: TokenGroup, module: ModuleWeights) -> Tensor:
    assert module.rows is not None
    rows = module.rows.index_select(0, group.slots[:: group.length])  # one a sequence
    A, B = module.V.transpose(1, 2).index_select(0, rows), module.U.index_select(0, rows)
    h = torch.bmm(x.view(len(rows), group.length, -1), A.transpose(1, 2))  # (sequences, length, q)
    return torch.bmm(h, B.transpose(1, 2)).flatten(0, 1)
