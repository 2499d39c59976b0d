"""The adapters that are served, and what each way of serving keeps of them: bundles, truncated adapters.

Real adapters first; beyond those there are, seeded variations of them. A variation has each rank component of each
module of a real adapter scaled by a log-normal factor: real shapes, ranks and norms, but another adapter. It lies in
the span of its original, so a collection of them compresses better than one of real adapters: **speed is measured on
them, quality is not.**
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.adapters.listing import CONFIG_FILE, WEIGHTS_FILE
from cluster.bundle.reading import Bundle
from cluster.compression.svd import truncate
from cluster.errors import ConfigError
from serve_app.placement import home_sizes

SPREAD = 0.3  # of the logarithm of a variation's scales


@dataclass(frozen=True)
class Fleet:
    """``folders`` in the order of popularity; the first ``num_real`` are real ones. ``rank`` is the largest.
    ``adapter_numbers``: how many numbers an adapter has, on average; ``rank_numbers``: how many one of rank 1 would."""

    folders: tuple[Path, ...]
    num_real: int
    rank: int
    modules: tuple[str, ...]
    adapter_numbers: float
    rank_numbers: int


def make_fleet(real: Path, num_adapters: int, folder: Path) -> Fleet:
    """``folder``/adapters gets links to the real ones and variations beside them; what is there already is kept."""
    originals = sorted(path.parent for path in real.glob(f"*/{CONFIG_FILE}"))
    if not originals:
        raise ConfigError(f"--adapters {real}: no PEFT adapter in it; expected folders with {CONFIG_FILE}")
    folders = []
    for index in range(num_adapters):
        original = originals[index % len(originals)]
        name = original.name if index < len(originals) else f"{original.name}-{index // len(originals)}"
        target = folder / "adapters" / name
        if not target.exists():
            _copy(original, target, None if index < len(originals) else index)
        folders.append(target)
    ranks: list[int] = []
    numbers: list[int] = []
    shapes: dict[str, int] = {}
    for path in folders[: len(originals)]:
        config, tensors = _read(path)
        ranks.append(int(config["r"]))
        numbers.append(sum(tensor.numel() for tensor in tensors.values()))
        shapes |= {name: max(tensor.shape) for name, tensor in tensors.items()}
    modules = sorted({name.split(".")[-3] for name in shapes})
    return Fleet(
        tuple(folders),
        min(num_adapters, len(originals)),
        max(ranks),
        tuple(modules),
        sum(numbers) / len(numbers),
        sum(shapes.values()),
    )


def _copy(original: Path, target: Path, seed: int | None) -> None:
    """``seed`` None: as it is. Nothing half-written stays under the target's name."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config, tensors = _read(original)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tensors.items():
            if ".lora_B." in name:
                scale = torch.exp(SPREAD * torch.randn(tensor.shape[1], generator=generator))
                tensors[name] = (tensor.float() * scale).to(tensor.dtype)
    save_file(tensors, part / WEIGHTS_FILE)
    (part / CONFIG_FILE).write_text(json.dumps(config))
    part.rename(target)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((path / CONFIG_FILE).read_text()), load_file(path / WEIGHTS_FILE)


def make_bundle(fleet: Fleet, base: Path, out: Path, clusters: int, rank: int, gate: float) -> Bundle:
    """By the job itself, unless ``out`` holds it from an earlier run."""
    adapters = fleet.folders[0].parent
    if not (out / "CURRENT").exists():
        line = [sys.executable, "-m", "compress_jobs", "run", "--adapters", str(adapters), "--base", str(base)]
        line += ["--out", str(out), "--clusters", str(clusters), "--rank", str(rank), "--gate", str(gate)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ConfigError(f"the job that makes {out} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return Bundle.open(str(out))


def bundle_bytes(bundle: Bundle, dtype: str) -> int:
    """Resident, as ``dtype``."""
    return sum(home_sizes(bundle.manifest, dtype).values())


def truncate_fleet(fleet: Fleet, rank: int, folder: Path) -> list[Path]:
    """The best rank-``rank`` approximation of every adapter, as PEFT folders of scale 1."""
    folders = []
    for path in fleet.folders:
        target = folder / path.name
        folders.append(target)
        if target.exists():
            continue
        config, tensors = _read(path)
        scale = float(config["lora_alpha"]) / float(config["r"])
        cut: dict[str, Tensor] = {}
        for name, B in tensors.items():
            if ".lora_B." in name:
                name_A = name.replace(".lora_B.", ".lora_A.")
                A, B_cut = truncate(tensors[name_A].float(), scale * B.float(), rank)
                cut |= {name_A: A.to(B.dtype), name: B_cut.to(B.dtype).contiguous()}
        target.mkdir(parents=True)
        save_file(cut, target / WEIGHTS_FILE)
        (target / CONFIG_FILE).write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}))
    return folders


def equal_bytes_rank(fleet: Fleet, num_bytes: int, dtype_bytes: int) -> int:
    """The rank at which all adapters, truncated, take ``num_bytes``; 1 where even that takes more."""
    return max(1, math.floor(num_bytes / (len(fleet.folders) * fleet.rank_numbers * dtype_bytes)))


def equal_bytes_slots(fleet: Fleet, num_bytes: int, dtype_bytes: int) -> int:
    """How many whole adapters take ``num_bytes``: at least 1, and no more than there are."""
    return max(1, min(len(fleet.folders), round(num_bytes / (fleet.adapter_numbers * dtype_bytes))))


def clusters_for(num_adapters: int) -> int:
    """min(25, N / 8): the paper has 25 clusters for a thousand adapters, one up to a hundred (Section 6.1)."""
    return max(1, min(25, num_adapters // 8))


def count_modes(bundle: Bundle) -> dict[str, int]:
    modes: Sequence[str] = [adapter.mode for adapter in bundle.manifest.adapters.values()]
    return {mode: modes.count(mode) for mode in ("core", "truncated", "raw")}
