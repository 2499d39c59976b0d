"""Bundles written straight from real adapters, without the compression job: lossless clusters and raw factors.

A cluster of adapters B_i A_i (scale folded) is exact with U, V orthonormal bases of [B_1 ... B_n] and
[A_1^T ... A_n^T], and S_i = (U^T B_i)(A_i V).

With diagonal cores it is exact where U and V are all B_i and A_i^T side by side, columns of norm 1, and each core
holds the norms of its own columns and zeros elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from cluster.adapters.base import read_base
from cluster.bundle.manifest import (
    Adapter,
    Base,
    Cluster,
    Manifest,
    Method,
    served_revision,
    template_hash,
    with_slots,
)
from cluster.bundle.revisions import manifest_key, object_key
from cluster.hashing import canonical_json, hash_tensors
from cluster.layer import ModuleShape

Factors = dict[str, tuple[Tensor, Tensor]]
"""Module -> A (q, d_in), B (d_out, q) with the scale folded in."""


def read_factors(folder: Path) -> Factors:
    """An adapter of the zoo, read by this file's own few lines: no rank or alpha patterns there."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    modules = sorted({key.split(".lora_")[0] for key in tensors})
    return {
        module.removeprefix("base_model.model."): (
            tensors[f"{module}.lora_A.weight"].float(),
            tensors[f"{module}.lora_B.weight"].float() * scale,
        )
        for module in modules
    }


def write_bundle(
    out: Path,
    base_path: Path,
    clusters: Mapping[str, Mapping[str, Path]],
    raw: Mapping[str, Path],
    diagonal: Collection[str] = (),
    templates: Mapping[str, str] | None = None,
    room: Mapping[str, Collection[Path]] | None = None,
    after: Manifest | None = None,
) -> Manifest:
    """Publish at ``out``: cluster name -> (adapter id -> folder), and raw adapter id -> folder. The clusters of
    ``diagonal`` get diagonal cores. ``templates``: adapter id -> the chat template it brought. ``room``: cluster name
    -> folders for which its basis is exact too. ``after``: the revision that this is the next of, on the same bases."""
    objects: dict[str, int] = {}
    adapters: dict[str, Adapter] = {}
    cluster_entries: dict[str, Cluster] = {}
    shapes: dict[str, ModuleShape] = {}

    def put(tensors: dict[str, Tensor]) -> str:
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        sha = "sha256:" + hashlib.sha256(data).hexdigest()
        _write(out / object_key(sha), data)
        objects[sha] = len(data)
        return sha

    def entry(adapter_id: str, folder: Path, mode: str, hashes: Sequence[str], **place: object) -> Adapter:
        version = "sha256:" + hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        errors = {"error": 0.0, "error_unweighted": 0.0, "error_worst_module": 0.0}
        served = served_revision(mode, *hashes)
        return Adapter(version=version, etag="test", mode=mode, served=served, **errors, **place)  # type: ignore[arg-type]

    for name, folders in clusters.items():
        members = [read_factors(folder) for folder in folders.values()]
        if after is not None:
            basis = load_file(out / object_key(after.clusters[name].basis))
            cores = cores_on(basis, members)
        elif name in diagonal:
            basis, cores = diagonal_cluster(members)
        else:
            basis, cores = lossless_cluster(members, [read_factors(folder) for folder in (room or {}).get(name, ())])
        for module in members[0]:
            shapes[module] = ModuleShape(basis[f"{module}.U"].shape[0], basis[f"{module}.V"].shape[0])
        cluster_entries[name] = Cluster(put(basis), put(cores), len(members))
        for slot, (adapter_id, folder) in enumerate(folders.items()):
            own = {module: core[slot].contiguous() for module, core in cores.items()}
            hashes = [cluster_entries[name].basis, hash_tensors(own)]
            adapters[adapter_id] = entry(adapter_id, folder, "core", hashes, cluster=name, slot=slot)
    for adapter_id, folder in raw.items():
        factors = read_factors(folder)
        tensors = {}
        for module, (A, B) in factors.items():
            tensors |= {f"{module}.A": A, f"{module}.B": B}
            shapes[module] = ModuleShape(B.shape[0], A.shape[1])
        sha = put(tensors)
        adapters[adapter_id] = entry(
            adapter_id, folder, "raw", [sha], factors=sha, rank=max(len(A) for A, _ in factors.values())
        )
    for adapter_id, template in (templates or {}).items():
        notes = {"chat-template": "another chat template than the base's"}
        own = {"chat_template": template_hash(template), "brought": notes}
        adapters[adapter_id] = replace(adapters[adapter_id], **own)  # type: ignore[arg-type]
    base = read_base(str(base_path))
    manifest = Manifest(
        bundle="",
        revision=0,
        parent=None,
        base=Base(base.name, base.fingerprint),
        method=Method("jd-diag" if diagonal else "jd-full", len(clusters), 64, 0, "float32", 1.0, tuple(raw)),
        modules=shapes,
        clusters=cluster_entries,
        adapters=with_slots(adapters),
        refused={},
        objects=objects,
        templates={template_hash(template): template for template in (templates or {}).values()},
    ).with_own_id()
    if after is not None:
        manifest = replace(manifest, bundle=after.bundle, revision=after.revision + 1, parent=after.revision)
    _write(out / manifest_key(manifest.bundle, manifest.revision), manifest.to_json())
    move_current(out, manifest)
    return manifest


def move_current(out: Path, manifest: Manifest) -> None:
    """In one step, as the job moves it."""
    document = {"bundle": manifest.bundle, "revision": manifest.revision, "token": "test"}
    _write(out / "CURRENT.new", canonical_json(document))
    (out / "CURRENT.new").replace(out / "CURRENT")


def lossless_cluster(
    members: Sequence[Factors], others: Sequence[Factors] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of a basis that is exact for all, and the cores of the members; all touch the same modules."""
    basis = {}
    for module in members[0]:
        pairs = [own[module] for own in (*members, *others)]
        basis[f"{module}.U"], _ = torch.linalg.qr(torch.cat([B for _, B in pairs], dim=1))
        basis[f"{module}.V"], _ = torch.linalg.qr(torch.cat([A.T for A, _ in pairs], dim=1))
    return basis, cores_on(basis, members)


def cores_on(basis: Mapping[str, Tensor], members: Sequence[Factors]) -> dict[str, Tensor]:
    return {
        module: torch.stack(
            [(basis[f"{module}.U"].T @ B) @ (A @ basis[f"{module}.V"]) for A, B in (own[module] for own in members)]
        )
        for module in members[0]
    }


def diagonal_cluster(members: Sequence[Factors]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same with cores (n, sum of ranks)."""
    basis, cores = {}, {}
    for module in members[0]:
        pairs = [member[module] for member in members]
        U, V = torch.cat([B for _, B in pairs], dim=1), torch.cat([A.T for A, _ in pairs], dim=1)
        norms = U.norm(dim=0) * V.norm(dim=0)
        basis |= {f"{module}.U": U / U.norm(dim=0), f"{module}.V": V / V.norm(dim=0)}
        ends = torch.tensor([len(A) for A, _ in pairs]).cumsum(0).tolist()
        cores[module] = torch.zeros(len(pairs), len(norms))
        for slot, (end, (A, _)) in enumerate(zip(ends, pairs, strict=True)):
            own = slice(end - len(A), end)
            cores[module][slot, own] = norms[own]
    return basis, cores


def flip_a_byte(path: Path) -> None:
    """In the middle of the file, without changing its length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
