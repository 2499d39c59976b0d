"""Placement: which group holds which homes. Pure functions on data; Ray is asked by the caller.

A group is one deployment; each of its replicas occupies a device with the base and all the group's homes.
A plan that does not fit is refused here, before anything starts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.bundle.manifest import Manifest
from cluster.bundle.serving_map import ServingMap, cluster_home
from cluster.errors import BaseModelError, PlacementError
from cluster.units import gib

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What activations, the allocator's slack and the library itself need is not counted one by one.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Group:
    """``replicas`` of it were planned for. ``resident_bytes`` is what the homes take on a device, besides the base."""

    name: str
    homes: tuple[str, ...]
    replicas: int
    resident_bytes: int


@dataclass(frozen=True)
class Needs:
    """Bytes that each replica needs besides its homes: the base's weights, and keys and values of a full batch."""

    base_bytes: int
    kv_bytes: int


def home_sizes(manifest: Manifest, dtype: str) -> dict[str, int]:
    """Home -> bytes on a device that holds it as ``dtype``; the manifest counts those of its own dtype.

    A stack of factors takes a little more: a row of zeros a module, and what the vLLM engine fills up (see
    ``serve_app.engine.vllm.plugin.settings.padded_rank``).
    """

    def resident(*objects: str) -> int:
        stored = sum(manifest.objects[name] for name in objects)
        return stored * DTYPE_BYTES[dtype] // DTYPE_BYTES.get(manifest.method.dtype, 4)

    sizes = {cluster_home(name): resident(c.basis, c.cores) for name, c in manifest.clusters.items()}
    factors: Counter[str] = Counter()
    for adapter_id, served in ServingMap.of(manifest).adapters.items():
        if own := manifest.adapters[adapter_id].factors:
            factors[served.home] += resident(own)
    return sizes | factors


def plan_groups(
    sizes: Mapping[str, int], clusters_per_group: int | str, devices: int | None, replicas: int
) -> tuple[Group, ...]:
    """Spread the homes of ``sizes`` (home -> bytes) over groups.

    Clusters: ``clusters_per_group`` each, or, for ``auto``, one a group while ``devices`` hold
    ``replicas`` of every group, else packed evenly. Factors homes follow, by bytes, so that groups end equally full,
    as far as whole homes allow. A bundle without clusters, or without anything, still gets a group. ``devices`` None:
    not known, no bound. ``replicas`` 0: groups go to zero and share the devices, and there may be more of them.
    Raises PlacementError when the groups need more devices than there are.
    """
    clusters = [home for home in sizes if home.startswith("cluster:")]
    factors = [home for home in sizes if not home.startswith("cluster:")]
    if clusters_per_group == "auto":
        num_groups = min(len(clusters), (devices or 1) // max(replicas, 1))
    else:
        num_groups = -(-len(clusters) // int(clusters_per_group))
    num_groups = max(num_groups, 1)
    if devices is not None and num_groups * replicas > devices:
        raise PlacementError(
            f"{len(clusters)} clusters at clusters_per_group={clusters_per_group} are {num_groups} groups of "
            f"{replicas} replicas, {num_groups * replicas} devices in all; there are {devices}: raise "
            "placement.clusters_per_group, lower placement.replicas (autoscaling.max) or add devices"
        )
    members: list[list[str]] = [[] for _ in range(num_groups)]
    filled = [0] * num_groups
    # Largest first into the emptiest: within 4/3 of the best possible balance (Graham 1969).
    for home in sorted(clusters, key=lambda home: (-sizes[home], home)):
        # Fewest clusters before fewest bytes, or a group could end with none, or with more than it may have.
        _put(
            home, min(range(num_groups), key=lambda index: (len(members[index]), filled[index])), members, filled, sizes
        )
    for home in sorted(factors, key=lambda home: (-sizes[home], home)):
        _put(home, min(range(num_groups), key=filled.__getitem__), members, filled, sizes)
    return tuple(
        Group(f"group-{index}", tuple(sorted(homes)), replicas, filled[index]) for index, homes in enumerate(members)
    )


def _put(home: str, index: int, members: list[list[str]], filled: list[int], sizes: Mapping[str, int]) -> None:
    members[index].append(home)
    filled[index] += sizes[home]


def homes_by_group(planned: Mapping[str, Sequence[str]], serving_map: ServingMap) -> dict[str, tuple[str, ...]]:
    """Group -> its homes in any revision of the bundle that was ``planned`` (group -> homes).

    A home that the plan has stays where it is. One that came later goes to the group that its name hashes highest with,
    so that routers and replicas agree without a word, whatever revisions they have seen (rendezvous hashing, Thaler and
    Ravishankar 1998).
    """
    groups = {home: group for group, homes in planned.items() for home in homes}

    def weight(group: str, home: str) -> bytes:
        return hashlib.sha256(f"{group} {home}".encode()).digest()

    found: dict[str, list[str]] = {group: [] for group in planned}
    for home in serving_map.homes():
        group = groups.get(home)
        found[group if group is not None else max(planned, key=lambda own: weight(own, home))].append(home)
    return {group: tuple(homes) for group, homes in found.items()}


def count_needs(config: Mapping[str, Any], stored_bytes: int, dtype: str, max_batch: int, max_model_len: int) -> Needs:
    """From the base's ``config.json`` and the bytes of its weights as stored.

    kv_bytes = max_batch * max_model_len * 2 * layers * kv_heads * head_dim * bytes of ``dtype``.
    """
    text = config.get("text_config", config)
    try:
        heads = int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        head_dim = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
        token_bytes = 2 * int(text["num_hidden_layers"]) * kv_heads * head_dim * DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError) as error:
        raise BaseModelError(f"base model: config.json does not give the size of its attention ({error!r})") from None
    stored_dtype = str(config.get("dtype") or config.get("torch_dtype") or dtype)
    base_bytes = stored_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES.get(stored_dtype, DTYPE_BYTES[dtype])
    return Needs(base_bytes, max_batch * max_model_len * token_bytes)


def check_fit(groups: Sequence[Group], needs: Needs, device_memory: int, replicas_per_device: int = 1) -> None:
    """Raises PlacementError, with the figures, for the first group that does not fit its share of
    ``device_memory`` bytes. Replicas have a GPU each; those on CPU share their machine."""
    share = device_memory // replicas_per_device
    for group in groups:
        total = needs.base_bytes + group.resident_bytes + needs.kv_bytes
        if total > USABLE_SHARE * share:
            raise PlacementError(
                f"{group.name} with {len(group.homes)} homes needs {gib(total)} on its device: base "
                f"{gib(needs.base_bytes)}, adapters {gib(group.resident_bytes)}, keys and values of "
                f"max_batch x max_model_len tokens {gib(needs.kv_bytes)}; {USABLE_SHARE:.0%} of its "
                f"{gib(share)} can be used"
                + (f" ({replicas_per_device} replicas share {gib(device_memory)})" if replicas_per_device > 1 else "")
                + ": lower limits.max_batch or limits.max_model_len, or placement.clusters_per_group with more devices"
            )
