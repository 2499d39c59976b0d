"""The way out: what is served for an adapter, as a standard PEFT LoRA."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from cluster.adapters.factors import Factors
from cluster.bundle.reading import Bundle
from cluster.errors import ConfigError, UnknownAdapter
from cluster.layer import ModuleWeights


def served_factors(bundle: Bundle, adapter_id: str) -> dict[str, Factors]:
    """Module -> (A, B), float32, of what is served: A = V^T, B = U S, or the adapter's own factors.

    Modules of its cluster that the adapter does not touch are left out. Raises UnknownAdapter, BundleError.
    """
    if adapter_id not in bundle.manifest.adapters:
        raise UnknownAdapter(f"adapter {adapter_id!r} is not in {bundle.address}; `show` lists those that are")
    served = bundle.serving_map.find(adapter_id)
    if served.cluster is None:
        factors = {module: (A.float(), B.float()) for module, (A, B) in bundle.load_factors(adapter_id).items()}
    else:
        weights = bundle.load_home(served.home).weights
        factors = {module: _factors(own, served.slot) for module, own in weights.items()}
    return {module: (A, B) for module, (A, B) in factors.items() if B.any()}


def export_adapter(bundle: Bundle, adapter_id: str, target: Path) -> int:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` (float32, scale 1) to ``target``.

    B = U S and A = V^T for an adapter on a basis, its own factors otherwise. Returns the number of modules.
    Raises UnknownAdapter, ConfigError when ``target`` is not an empty folder, BundleError, StoreError.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {target}: exists and is not an empty folder; give a new one")
    factors = served_factors(bundle, adapter_id)
    tensors = {}
    for module, (A, B) in factors.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = A.contiguous(), B.contiguous()
    config = _peft_config(bundle.manifest.base.name, {module: A.shape[0] for module, (A, _) in factors.items()})
    try:
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--to {target}: cannot be written ({error}); give another folder") from None
    return len(factors)


def _factors(weights: ModuleWeights, slot: int) -> Factors:
    assert weights.cores is not None
    U, V, core = weights.U.float(), weights.V.float(), weights.cores[slot].float()
    return V.T, U * core if core.dim() == 1 else U @ core


def _peft_config(base_name: str, ranks: dict[str, int]) -> dict[str, object]:
    largest = max(ranks.values())
    # Ranks may differ by module; alpha follows them, so that the scale alpha / r is 1 everywhere. PEFT reads
    # the keys as patterns: escape the dots, pin the start.
    smaller = {"^" + module.replace(".", r"\."): rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
    }
