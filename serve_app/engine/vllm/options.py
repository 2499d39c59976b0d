"""What vLLM is started with: for the base alone, and for the homes on top."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bundle.reading import HomeWeights
from cluster.bundle.serving_map import ServingMap, factors_rank
from cluster.errors import ConfigError
from serve_app.engine.vllm.plugin.settings import PluginSettings, Products, padded_rank

WORKER = "serve_app.engine.vllm.plugin.worker.HomeWorker"
_LEAST_SPARE = 4


@dataclass(frozen=True)
class VllmSettings:
    """``max_batch`` requests run at once; ``max_model_len`` bounds prompt and answer together, in tokens.

    ``kv_bytes`` are for keys and values; None: what is left of a GPU. ``num_threads`` is for torch on
    a CPU. ``products`` None: numba on a CPU in float32, grouped in what Numba has no numbers for, static on a GPU (see
    ``serve_app.engine.vllm.plugin.settings``). ``headroom``: the share of its adapters for which there is room besides,
    for those that a next revision changes or brings: both revisions are there for a while. ``least_clusters``: for so
    many there is room, though fewer may have members now.
    """

    device: str = "cpu"
    dtype: str = "float32"
    max_batch: int = 32
    max_model_len: int = 2048
    num_threads: int | None = None
    kv_bytes: int | None = 1 << 30
    tensor_parallel_size: int = 1
    products: Products | None = None
    reasoning_parser: str | None = None
    structured_outputs_backend: str = "auto"
    headroom: float = 0.0
    least_clusters: int = 0


def base_options(base: Path, settings: VllmSettings) -> dict[str, Any]:
    """vLLM's own arguments for ``base`` alone; the adapters' come on top. Sets the environment of this process and of
    those that vLLM starts: before vLLM is imported, which reads it then."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    options: dict[str, Any] = {}
    if settings.device == "cpu":
        # Replicas share a machine: bound threads would all sit on the first cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if settings.num_threads is not None:
            os.environ["OMP_NUM_THREADS"] = str(settings.num_threads)
        options = {"enforce_eager": True}
        if settings.tensor_parallel_size == 1:
            # The worker within vLLM's engine process. On CPUs it is a process of its own otherwise, for which that one
            # waits by spinning: on a core that the products need. By name: vLLM turns plain "uni" back.
            options["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    if settings.kv_bytes is not None:
        options["kv_cache_memory_bytes"] = settings.kv_bytes
    if settings.reasoning_parser is not None:
        options["reasoning_parser"] = settings.reasoning_parser  # so that a schema holds after the reasoning
    if settings.structured_outputs_backend != "auto":
        options["structured_outputs_backend"] = settings.structured_outputs_backend
    return options | {
        "model": str(base),
        "load_format": "safetensors",
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_batch,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": True,
        "trust_remote_code": False,
        "generation_config": "vllm",  # sampling is what the request says, no file's defaults
        "disable_log_stats": True,
    }


def home_options(
    loaded: Mapping[str, HomeWeights], homes: Sequence[str], serving_map: ServingMap, settings: VllmSettings
) -> dict[str, Any]:
    """vLLM's arguments for adapters, with room for all of ``homes``, those that failed to load included. ``loaded``:
    home -> its weights, one at least."""
    plugin = _plugin_settings(loaded, homes, serving_map, settings)
    return {
        "enable_lora": True,
        # Of distinct adapters in a batch, which is no limit of ours.
        "max_loras": settings.max_batch,
        # The least of vLLM's: its own slots hold nothing.
        "max_lora_rank": 8,
        "lora_target_modules": sorted({name.rpartition(".")[2] for own in loaded.values() for name in own}),
        "additional_config": plugin.to_config(),
    }


def _plugin_settings(
    loaded: Mapping[str, HomeWeights], homes: Sequence[str], serving_map: ServingMap, settings: VllmSettings
) -> PluginSettings:
    clusters = [home for home in homes if home.startswith("cluster:")]
    diagonal = {
        own.cores.dim() == 2 for weights in loaded.values() for own in weights.values() if own.cores is not None
    }
    if len(diagonal) > 1:
        raise ConfigError(
            "engine vllm: clusters with diagonal and with full cores in one replica are not supported; set "
            "placement.clusters_per_group to 1, or engine to transformers"
        )
    by_device: Products = "static"
    if settings.device == "cpu":
        by_device = "numba" if settings.dtype == "float32" else "grouped"
    products = settings.products or by_device
    num_slots, num_members = serving_map.num_slots(), Counter(own.home for own in serving_map.adapters.values())
    ranks = [
        max(own.U.shape[1], own.V.shape[1])
        for weights in loaded.values()
        for own in weights.values()
        if own.cores is not None
    ]
    factor_slots: Counter[int] = Counter()
    for home in homes:
        if (rank := factors_rank(home)) is not None:
            factor_slots[padded_rank(rank, products)] += num_members[home]
    if not factor_slots and settings.headroom and products in ("grouped", "numba"):
        # What a batch has nobody in costs nothing there, but on GPUs every bucket is in every step.
        factor_slots[padded_rank(max(ranks, default=1), products)] = 0
    spare = settings.headroom
    return PluginSettings(
        num_clusters=max(len(clusters), settings.least_clusters if clusters else 0),
        slots_per_cluster=_with_spare(max((num_slots[home] for home in clusters), default=0), spare),
        rank=max(ranks, default=1),
        factor_slots=tuple(sorted((rank, _with_spare(slots, spare)) for rank, slots in factor_slots.items())),
        is_diagonal=False not in diagonal,
        products=products,
    )


def _with_spare(count: int, headroom: float) -> int:
    return count + (max(_LEAST_SPARE, math.ceil(count * headroom)) if headroom else 0)
