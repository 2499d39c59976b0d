"""A bundle with many more adapters than were compressed: the same bases, more cores.

Beside each core stand copies of it, every entry scaled by its own seeded log-normal factor. Ten thousand adapters are
registered so without ten thousand being made first: what an engine holds and looks up for them is what it would be.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save

from cluster.bundle.manifest import served_revision
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import manifest_key, object_key, read_object
from cluster.hashing import canonical_json
from cluster.store.address import open_store
from infra.bench.serving.fleet import SPREAD


def enlarge(bundle: Bundle, num_adapters: int, out: Path) -> Bundle:
    """At least ``num_adapters`` adapters on the clusters of ``bundle``, published at ``out``; what stands alone is left
    out. A bundle that is there already is taken."""
    if (out / "CURRENT").exists():
        return Bundle.open(str(out))
    store, manifest = open_store(str(out)), bundle.manifest
    members = {name: adapter for name, adapter in manifest.adapters.items() if adapter.mode == "core"}
    copies = -(-num_adapters // len(members))
    objects, clusters, adapters = {}, {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, cluster in manifest.clusters.items():
        basis = bundle.store.read(object_key(cluster.basis)).data
        cores = {}
        for module, own in read_object(bundle.store, cluster.cores, name).items():
            scales = torch.exp(SPREAD * torch.randn((copies, *own.shape), generator=generator))
            scales[0] = 1
            cores[module] = (own.float() * scales).flatten(0, 1).to(own.dtype)
        data = save(cores)
        sha = "sha256:" + hashlib.sha256(data).hexdigest()
        for key, content in ((cluster.basis, basis), (sha, data)):
            store.write(object_key(key), content)
            objects[key] = len(content)
        clusters[name] = dataclasses.replace(cluster, cores=sha, num_slots=copies * cluster.num_slots)
    for name, adapter in members.items():
        own_cluster = clusters[str(adapter.cluster)]
        for copy in range(copies):
            slot = copy * (own_cluster.num_slots // copies) + int(adapter.slot or 0)
            served = served_revision("core", own_cluster.basis, own_cluster.cores, str(slot))
            adapters[name if copy == 0 else f"{name}-copy-{copy}"] = dataclasses.replace(
                adapter, slot=slot, served=served
            )
    made = dataclasses.replace(
        manifest, revision=0, parent=None, clusters=clusters, adapters=adapters, objects=objects
    ).with_own_id()
    store.write(manifest_key(made.bundle, 0), made.to_json())
    store.write("CURRENT", canonical_json({"bundle": made.bundle, "revision": 0, "token": "bench"}))
    return Bundle.open(str(out))
