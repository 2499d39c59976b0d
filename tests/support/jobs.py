"""Running the compression job in tests, and measuring what it published without its own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from compress_jobs.job.options import RunOptions
from compress_jobs.job.prepare import prepare
from compress_jobs.job.run import Outcome, run

# A few of the shipped adapters: rank 8, rank 16, rank 4 on q/v only, rsLoRA.
FEW = ("number-en", "first-letter", "roman", "city-country", "country-fr", "past")


def run_job(adapters: Path | str, base: Path | str, out: Path | str, **options: Any) -> Outcome:
    """With a gate that is given, unless ``gate`` says otherwise: choosing one takes seconds, and most tests ask for
    something else."""
    options = {"gate": 0.25} | options
    return run(prepare(RunOptions(adapters=str(adapters), base=str(base), out=str(out), **options)))


def copy_adapters(zoo: Path, target: Path, names: tuple[str, ...] = FEW) -> Path:
    for name in names:
        shutil.copytree(zoo / name, target / name)
    return target


def rewrite(adapter: Path, **changes: Any) -> None:
    """Change keys of an adapter's config."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def scale_factor_b(adapter: Path, by: float) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: t * by if "lora_B" in name else t for name, t in tensors.items()}, path)


def read_factors(adapter: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> (scale * B, A) in float64, straight from an adapter's files (not by the project's reader)."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = {name: t.double().numpy() for name, t in load_file(adapter / "adapter_model.safetensors").items()}
    modules = sorted({name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors})
    return {
        m: (scale * tensors[f"base_model.model.{m}.lora_B.weight"], tensors[f"base_model.model.{m}.lora_A.weight"])
        for m in modules
    }


def dense_modules(adapter: Path) -> dict[str, np.ndarray]:
    """Module -> B A, dense."""
    return {module: B @ A for module, (B, A) in read_factors(adapter).items()}


def singular_energies(adapter: Path) -> dict[str, np.ndarray]:
    """Module -> squared singular values of B A, descending."""
    return {
        module: np.linalg.svd(np.linalg.qr(B)[1] @ np.linalg.qr(A.T)[1].T, compute_uv=False) ** 2
        for module, (B, A) in read_factors(adapter).items()
    }


def dense_served(out: Path, manifest: dict[str, Any], adapter_id: str) -> dict[str, np.ndarray]:
    """Module -> what is served for an adapter, dense in float64, straight from the objects and the manifest."""

    def tensors(sha: str) -> dict[str, np.ndarray]:
        path = out / "objects" / f"{sha.removeprefix('sha256:')}.safetensors"
        return {name: t.to(torch.float64).numpy() for name, t in load_file(path).items()}

    adapter = manifest["adapters"][adapter_id]
    if adapter["mode"] != "core":
        factors = tensors(adapter["factors"])
        modules = {name[:-2] for name in factors}
        return {m: factors[f"{m}.B"] @ factors[f"{m}.A"] for m in modules}
    cluster = manifest["clusters"][adapter["cluster"]]
    basis, cores = tensors(cluster["basis"]), tensors(cluster["cores"])
    own = {m: core[adapter["slot"]] for m, core in cores.items()}
    own = {m: np.diag(core) if core.ndim == 1 else core for m, core in own.items()}
    return {m: basis[f"{m}.U"] @ core @ basis[f"{m}.V"].T for m, core in own.items()}


def dense_error(adapter: Path, served: dict[str, np.ndarray]) -> float:
    """sum_m ||M - M^||^2 / sum_m ||M||^2 over the modules the adapter touches."""
    original = dense_modules(adapter)
    zero = np.zeros(())
    lost = sum(float(np.square(M - served.get(module, zero)).sum()) for module, M in original.items())
    return lost / sum(float(np.square(M).sum()) for M in original.values())


def current_manifest(out: Path) -> dict[str, Any]:
    current = json.loads((out / "CURRENT").read_text())
    path = out / "bundles" / current["bundle"] / "revisions" / str(current["revision"]) / "manifest.json"
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


def object_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "objects").glob("*.safetensors")}
