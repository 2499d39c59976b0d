"""A home of factors: the objects of truncated and raw adapters, one each, read into one stack a module.

An object an adapter, as its grade was decided: revisions share it, `add` and `update` write no other's, and one that
cannot be read takes no other's slot with it. What reading them costs beside their bytes is a request each, many at a
time: objects of one layout (the same modules, shapes and dtype, as truncation to a rank leaves them) are taken apart
as one block, not tensor by tensor.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from cluster.bundle.revisions import parse_object, read_bytes
from cluster.errors import BundleError, StoreMissing
from cluster.layer import ModuleShape, ModuleWeights
from cluster.store.protocol import Store

_READS_AT_ONCE = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FactorsObject:
    """``rank``: the largest that its factors may have. ``where`` names the adapter in what is raised."""

    sha: str
    rank: int
    where: str


Failures = dict[int, BundleError | StoreMissing]
"""Slot -> why its adapter is not in the stack."""


@dataclass(frozen=True)
class _Block:
    """The adapters of ``slots``, g of them, whose objects have one layout: module -> A (g + 1, q, d_in) and
    B (g + 1, d_out, q), the last row of zeros."""

    slots: Sequence[int]
    factors: Mapping[str, tuple[Tensor, Tensor]]


def read_factors(
    store: Store, objects: Mapping[int, FactorsObject], shapes: Mapping[str, ModuleShape]
) -> tuple[dict[str, ModuleWeights], Failures]:
    """``objects`` are those of a home, by slot. Module -> the stack of all that could be read, as stored, on the CPU.

    Raises StoreError where the store as a whole fails; what is wrong with one object is among the failures.
    """
    blobs, failures = _read_all(store, objects)
    by_layout: dict[tuple[bytes, int], list[int]] = defaultdict(list)
    for slot, blob in blobs.items():
        by_layout[_header(blob), len(blob)].append(slot)
    blocks = []
    for slots in by_layout.values():
        first = objects[slots[0]]
        try:
            pairs = factor_pairs(parse_object(blobs[slots[0]], first.sha, first.where), shapes, first)
        except BundleError as error:
            told = str(error).removeprefix(first.where)
            failures |= {slot: BundleError(objects[slot].where + told) for slot in slots}
        else:
            blocks.append(_Block(slots, _take_apart([blobs.pop(slot) for slot in slots], pairs)))
    num_slots = max(objects) + 1
    modules = sorted({module for block in blocks for module in block.factors})
    touching = {module: [block for block in blocks if module in block.factors] for module in modules}
    return {module: _stack(own, module, num_slots) for module, own in touching.items()}, failures


def factor_pairs(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, ModuleShape], stored: FactorsObject
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A (q, d_in), B (d_out, q) of one adapter's object. Raises BundleError unless they fit ``shapes`` and
    its rank."""
    pairs, where = {}, stored.where
    if not tensors:
        raise BundleError(f"{where}: its object holds no tensor, expected its factors")
    for module in sorted({name.rpartition(".")[0] for name in tensors}):
        A, B = pair_of(tensors, module, ("A", "B"), where)
        q, shape = A.shape[0], shape_of(shapes, module, where)
        if not 0 < q <= stored.rank:
            raise BundleError(f"{where}: tensor {module}.A is of rank {q}, the manifest says {stored.rank} at most")
        check_shape(where, f"{module}.A", A, (q, shape.d_in))
        check_shape(where, f"{module}.B", B, (shape.d_out, q))
        pairs[module] = A, B
    return pairs


def pair_of(tensors: Mapping[str, Tensor], module: str, names: tuple[str, str], where: str) -> tuple[Tensor, Tensor]:
    try:
        first, second = (tensors[f"{module}.{name}"] for name in names)
    except KeyError as error:
        raise BundleError(f"{where}: tensor {error} is missing") from None
    if first.dim() != 2 or second.dim() != 2:
        raise BundleError(f"{where}: {module} has factors of {first.dim()} and {second.dim()} dimensions, expected 2")
    return first, second


def shape_of(shapes: Mapping[str, ModuleShape], module: str, where: str) -> ModuleShape:
    shape = shapes.get(module)
    if shape is None:
        raise BundleError(f"{where}: tensors of module {module!r}, which the manifest does not list")
    return shape


def check_shape(where: str, tensor_name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected or tensor.dtype not in _DTYPES:
        raise BundleError(f"{where}: tensor {tensor_name} is {tensor.dtype} {tuple(tensor.shape)}, expected {expected}")


def _read_all(store: Store, objects: Mapping[int, FactorsObject]) -> tuple[dict[int, bytes], Failures]:
    def read(slot: int) -> bytes | BundleError | StoreMissing:
        try:
            return read_bytes(store, objects[slot].sha, objects[slot].where)
        except (BundleError, StoreMissing) as error:
            return error

    blobs: dict[int, bytes] = {}
    failures: Failures = {}
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for slot, result in zip(objects, pool.map(read, objects), strict=True):
            if isinstance(result, bytes):
                blobs[slot] = result
            else:
                failures[slot] = result
    return blobs, failures


def _header(blob: bytes) -> bytes:
    """Of a safetensors file: names, dtypes, shapes and places of its tensors, as JSON after its length in 8 bytes."""
    return blob[8 : 8 + int.from_bytes(blob[:8], "little")]


def _take_apart(blobs: Sequence[bytes], like: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors of files that all have the header of the one that ``like`` was parsed from (which found it sound),
    stacked, with a row of zeros behind them: views of one block."""
    header = _header(blobs[0])
    start = 8 + len(header)
    # Rows of whole 8 bytes, that any dtype can look at.
    block = np.empty((len(blobs) + 1, -(-(len(blobs[0]) - start) // 8) * 8), dtype=np.uint8)
    block[-1] = 0
    for row, blob in zip(block[:-1], blobs, strict=True):
        row[: len(blob) - start] = np.frombuffer(blob, dtype=np.uint8, offset=start)
    places = json.loads(header)

    def of(name: str, tensor: Tensor) -> Tensor:
        begin, end = places[name]["data_offsets"]
        return torch.from_numpy(block[:, begin:end]).view(tensor.dtype).view(len(block), *tensor.shape)

    return {module: (of(f"{module}.A", A), of(f"{module}.B", B)) for module, (A, B) in like.items()}


def _stack(blocks: Sequence[_Block], module: str, num_slots: int) -> ModuleWeights:
    num_rows = sum(len(block.slots) for block in blocks)
    rows = torch.full((num_slots,), num_rows)
    rows[[slot for block in blocks for slot in block.slots]] = torch.arange(num_rows)
    pairs = [block.factors[module] for block in blocks]
    A, B = pairs[0] if len(pairs) == 1 else _join(pairs)
    return ModuleWeights(U=B, V=A.mT, cores=None, rows=rows)


def _join(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The rows of all, smaller ranks filled up with zeros, as the widest dtype has them, and one row of zeros."""
    dtype = reduce(torch.promote_types, (factor.dtype for pair in pairs for factor in pair))
    q, num_rows = max(A.shape[1] for A, _ in pairs), sum(len(A) - 1 for A, _ in pairs)
    A_0, B_0 = pairs[0]
    A_all = torch.zeros(num_rows + 1, q, A_0.shape[2], dtype=dtype)
    B_all = torch.zeros(num_rows + 1, B_0.shape[1], q, dtype=dtype)
    start = 0
    for A, B in pairs:
        end, own_q = start + len(A) - 1, A.shape[1]
        A_all[start:end, :own_q], B_all[start:end, :, :own_q] = A[:-1], B[:-1]
        start = end
    return A_all, B_all
