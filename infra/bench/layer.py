"""One adapted layer, in bytes and operations: how near its deltas come to what the memory allows.

    python -m infra.bench.layer                   # on this machine's CPU
    python -m infra.bench.layer --device cuda     # with the Triton kernels (make gpu-check does it)

The layer is a packed q/k/v (d -> d, d/4, d/4) with 25 bases, or one; its tokens ask 64 adapters at most. Ways:

    base      the layer's own product, without adapters
    grouped   torch's products, a basis at a time (what the vLLM engine does on CPUs in bfloat16 and float16; on a CPU)
    numba     this project's CPU kernel (what it does on CPUs in float32)
    static    torch's products, bases picked by vLLM's shrink and expand (what it does on GPUs)
    triton    this project's kernels
    lora      vLLM's shrink and expand on the same adapters uncompressed, of the same rank: Punica's way

floor: the bytes that must be read and written at least (the tokens' bases, their cores, x, and out both ways) over the
bandwidth of a large copy on this machine; share = floor / time. Operations are 2 T (n R d + n R^2 + R sum of d_out).
Enough layers take turns that no cache holds their weights; on a GPU all of them are one captured graph. Medians.
static, lora and numba need vLLM. Last line: JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infra.bench.slot_rank import slot_rank
from serve_app.engine.vllm.plugin.basis_stack import BasisStack
from serve_app.engine.vllm.plugin.settings import PluginSettings, Products
from serve_app.engine.vllm.plugin.token_index import Place, TokenIndex
from serve_app.placement import DTYPE_BYTES

SLOTS_EACH = 41  # 25 clusters of 41: a thousand adapters
WEIGHTS_BYTES = 256 << 20  # of all layers together: beyond any cache


@dataclass(frozen=True)
class Case:
    """``adapters`` distinct ones are asked by ``tokens`` tokens, spread over ``bases`` bases."""

    d: int
    rank: int
    tokens: int
    adapters: int
    bases: int

    @property
    def d_outs(self) -> tuple[int, int, int]:
        return self.d, self.d // 4, self.d // 4

    def asked(self) -> list[tuple[int, int]]:
        """Each token's basis and slot."""
        return [(a % self.bases, a // self.bases % SLOTS_EACH) for a in (t % self.adapters for t in range(self.tokens))]

    def num_bytes(self, size: int) -> int:
        bases, cores = len({basis for basis, _ in self.asked()}), len(set(self.asked()))
        basis_numbers = self.rank * (3 * self.d + sum(self.d_outs))
        numbers = bases * basis_numbers + cores * 3 * self.rank**2 + self.tokens * (self.d + 2 * sum(self.d_outs))
        return numbers * size

    @property
    def operations(self) -> int:
        return 2 * self.tokens * self.rank * (3 * self.d + 3 * self.rank + sum(self.d_outs))


Way = Callable[[Tensor, Tensor, int], Any]
"""Adds to out, from x, the deltas of layer number i."""


def make_ways(case: Case, names: Sequence[str], dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Way], int]:
    """And the number of layers that take turns."""
    layer_bytes = case.bases * case.rank * (3 * case.d + sum(case.d_outs)) * dtype.itemsize
    num_layers = max(2, min(64, WEIGHTS_BYTES // layer_bytes))

    def settings(products: Products) -> PluginSettings:
        return PluginSettings(case.bases, SLOTS_EACH, case.rank, (), False, products)

    def make_stacks(products: Products) -> list[BasisStack]:
        return [BasisStack(settings(products), case.d, case.d_outs, dtype, device) for _ in range(num_layers)]

    stacks = make_stacks("grouped")
    compiled = make_stacks("numba") if "numba" in names else []
    for stack in [*stacks, *compiled]:
        for tensor in (stack.V, stack.cores, *stack.U):
            tensor.normal_(std=case.d**-0.5)
    places = {1 + basis * SLOTS_EACH + slot: Place(basis, slot) for basis, slot in case.asked()}
    ids = [1 + basis * SLOTS_EACH + slot for basis, slot in case.asked()]
    indices: dict[str, TokenIndex] = {}
    products: tuple[Products, ...] = ("grouped", "numba", "static", "triton")
    for name in products:
        indices[name] = TokenIndex(settings(name), case.tokens, device)
        (positions,) = indices[name].set(ids, places)
    on_bases, tasks = indices["grouped"].on_bases, indices["numba"].on_bases
    assert on_bases is not None
    assert tasks is not None
    weights = [torch.randn(sum(case.d_outs), case.d, dtype=dtype, device=device) for _ in range(num_layers)]
    ways: dict[str, Way] = {
        "base": lambda out, x, i: torch.mm(x, weights[i].T, out=out),
        "grouped": lambda out, x, i: stacks[i].add_sorted(out, x, on_bases),
        "numba": lambda out, x, i: compiled[i].add_sorted(out, x, tasks),
        "triton": lambda out, x, i: stacks[i].add_triton(out, x, indices["triton"]),
    }
    if {"static", "lora"} & set(names):
        kernels = vllm_kernels(case.bases, positions, case, dtype, device)
        slots = indices["static"].core_slots
        ways["static"] = lambda out, x, i: stacks[i].add_static(out, x, slots, kernels)
        loras = sorted(places)
        own = vllm_kernels(len(loras), np.array([loras.index(i) for i in ids]), case, dtype, device)
        num_loras = max(2, min(num_layers, WEIGHTS_BYTES // (len(loras) * layer_bytes // case.bases)))
        A = [
            tuple(torch.randn(len(loras) + 1, 1, case.rank, case.d, dtype=dtype, device=device) for _ in range(3))
            for _ in range(num_loras)
        ]
        B = [
            tuple(torch.randn(len(loras) + 1, 1, d, case.rank, dtype=dtype, device=device) for d in case.d_outs)
            for _ in range(num_loras)
        ]
        ways["lora"] = lambda out, x, i: own.add_lora_linear(
            out, x, A[i % num_loras], B[i % num_loras], 1.0, case.d_outs
        )
    return {name: ways[name] for name in names}, num_layers


def vllm_kernels(num_slots: int, slots: np.ndarray, case: Case, dtype: torch.dtype, device: torch.device) -> Any:
    """vLLM's shrink and expand, told each token's slot."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.punica_wrapper.punica_selector import get_punica_wrapper

    from serve_app.engine.vllm.plugin.lora_layers import update_kernels

    config = LoRAConfig(max_lora_rank=slot_rank(case.rank), max_loras=num_slots + 1, lora_dtype=dtype)
    kernels = get_punica_wrapper(case.tokens, max_batches=case.tokens, device=device, lora_config=config)
    update_kernels(kernels, slots, num_slots)
    return kernels


def seconds_a_layer(
    way: Way, case: Case, num_layers: int, repeats: int, dtype: torch.dtype, device: torch.device
) -> float:
    x = torch.randn(case.tokens, case.d, dtype=dtype, device=device)
    out = torch.zeros(case.tokens, sum(case.d_outs), dtype=dtype, device=device)

    def once() -> None:
        for i in range(num_layers):
            way(out, x, i)

    once()
    run: Callable[[], object] = once
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        run = graph.replay
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times) / num_layers


def bandwidth(device: torch.device) -> float:
    """Bytes/s of a copy of 512 MiB, read and written."""
    source = torch.ones(128 << 20, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(7):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * source.numel() * 4 / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m infra.bench.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=tuple(DTYPE_BYTES), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--d", type=int, nargs="+", default=[1024, 4096], help="hidden sizes, multiples of 4 (default: 1024 4096)")
    add("--ranks", type=int, nargs="+", default=[16, 64])
    add("--tokens", type=int, nargs="+", default=[1, 64, 2048], help="of a step (default: 1 64 2048)")
    add("--bases", type=int, nargs="+", default=[1, 25])
    add("--repeats", type=int, default=11)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; give --device cpu, or install a build of torch for GPUs")
    dtype_name = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    dtype, device = getattr(torch, dtype_name), torch.device(args.device)
    # Grouped products look at each batch, which no captured graph can.
    names = ["base", "grouped" if args.device == "cpu" else "triton"]
    if importlib.util.find_spec("vllm") is not None:
        names += ["numba"] if args.device == "cpu" and dtype_name == "float32" else []
        names += ["static", "lora"]
    rate = bandwidth(device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} CPUs"
    print(
        f"{where}, torch {torch.__version__}, {dtype_name}; copies {rate / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}"
    )
    head = f"{'d':>6} {'rank':>5} {'tokens':>7} {'bases':>6} {'way':>8} {'us':>9}"
    print(f"\n{head} {'floor us':>9} {'share':>6} {'GFLOP/s':>9} {'of base':>8}")
    results = []
    with torch.inference_mode():
        for d in args.d:
            for rank in args.ranks:
                for tokens in args.tokens:
                    for bases in args.bases:
                        case = Case(d, rank, tokens, min(64, tokens), bases)
                        ways, num_layers = make_ways(case, names, dtype, device)
                        floor, base = case.num_bytes(dtype.itemsize) / rate, 0.0
                        for name, way in ways.items():
                            seconds = seconds_a_layer(way, case, num_layers, args.repeats, dtype, device)
                            base = base or seconds
                            entry = asdict(case) | {"way": name, "us": round(seconds * 1e6, 1)}
                            if name != "base":
                                entry |= {"floor_us": round(floor * 1e6, 1), "share": round(floor / seconds, 3)}
                                entry |= {"gflops": round(case.operations / seconds / 1e9, 1)}
                                entry |= {"of_base": round(seconds / base, 3)}
                            results.append(entry)
                            cells = [entry.get(key, "") for key in ("floor_us", "share", "gflops", "of_base")]
                            print(
                                f"{d:>6} {rank:>5} {tokens:>7} {bases:>6} {name:>8} {entry['us']:>9} "
                                "{:>9} {:>6} {:>9} {:>8}".format(*cells),
                                flush=True,
                            )
    print(
        json.dumps(
            {
                "device": where,
                "torch": torch.__version__,
                "dtype": dtype_name,
                "copy_bytes_per_s": round(rate),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
