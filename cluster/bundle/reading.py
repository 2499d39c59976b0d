"""Reading a bundle: from its address to verified tensors.

Every object is checked against its hash, its tensors against the manifest: a reader never hands on bytes
that the job did not write.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.adapters.factors import Factors
from cluster.bundle.factors import FactorsObject, check_shape, factor_pairs, pair_of, read_factors, shape_of
from cluster.bundle.manifest import Cluster, Manifest
from cluster.bundle.revisions import newest_revision, parse_current, read_current, read_manifest, read_object
from cluster.bundle.serving_map import ServingMap
from cluster.errors import BundleError, ConfigError, StoreMissing
from cluster.layer import ModuleWeights
from cluster.store.address import open_store
from cluster.store.protocol import Store

HomeWeights = dict[str, ModuleWeights]
"""Module name -> its weights, for one home."""


@dataclass(frozen=True)
class LoadedHome:
    """``failed``: slot -> why the adapter that has it cannot be served, though the home can."""

    weights: HomeWeights
    failed: Mapping[int, str] = field(default_factory=dict)


_PINNED = re.compile(r"(?P<out>.+)/bundles/(?P<bundle>b-[0-9a-f]{16})/?")


def pinned_bundle(address: str) -> tuple[Store, str]:
    """The store and the bundle that ``address`` pins. Raises ConfigError where it pins none."""
    if (pinned := _PINNED.fullmatch(address)) is None:
        raise ConfigError(f"{address}: expected <out>/bundles/<bundle_id>")
    return open_store(pinned["out"]), pinned["bundle"]


class Bundle:
    """One revision, open for reading. Picklable by its ``address`` (see ``open``)."""

    def __init__(self, store: Store, manifest: Manifest) -> None:
        self.store, self.manifest = store, manifest
        self.serving_map = ServingMap.of(manifest)

    @staticmethod
    def open(address: str, revision: int | None = None) -> Bundle:
        """``address`` is ``<out>`` (its CURRENT revision) or ``<out>/bundles/<bundle_id>``, which pins the
        bundle and takes ``revision``; without one CURRENT's, where CURRENT names this bundle, else the newest.

        Raises StoreMissing when nothing is published there, BundleError when it is not what it should be,
        ConfigError for a revision without its bundle.
        """
        pinned = _PINNED.fullmatch(address)
        if revision is not None and not pinned:
            raise ConfigError(
                f"{address}: revision {revision} needs the bundle it is of; give <out>/bundles/<bundle_id>"
            )
        store = open_store(pinned["out"] if pinned else address)
        if pinned:
            bundle = pinned["bundle"]
            number = standing_revision(store, bundle) if revision is None else revision
        else:
            try:
                current, _ = parse_current(store, store.read("CURRENT"))
            except StoreMissing as error:
                # Its text tells a missing bucket from a missing object.
                raise StoreMissing(
                    f"{address}: no CURRENT there; run the compression job with --out {address} first ({error})"
                ) from None
            bundle, number = current.bundle, current.revision
        return Bundle(store, read_manifest(store, bundle, number))

    @property
    def address(self) -> str:
        """Pinned: with ``revision`` it opens this very revision again, in any process."""
        return f"{self.store.uri}/bundles/{self.manifest.bundle}"

    def load_home(self, home: str) -> LoadedHome:
        """The verified tensors of a home (``cluster:0``, ``factors:2.0``), on the CPU, as stored.

        Raises BundleError and StoreError; of a home of factors, what is wrong with one adapter's is raised only where
        no other's can be read.
        """
        kind, _, name = home.partition(":")
        if kind == "cluster" and name in self.manifest.clusters:
            return LoadedHome(self._load_cluster(name, self.manifest.clusters[name]))
        if members := self.serving_map.members(home):
            return self._load_stack(members)
        raise BundleError(f"{self.address}: no home {home!r} in revision {self.manifest.revision}")

    def load_factors(self, adapter_id: str) -> dict[str, Factors]:
        """Module -> (A, B), as stored, of a truncated or raw adapter. Raises BundleError, StoreError."""
        stored = self._factors_object(adapter_id)
        return factor_pairs(read_object(self.store, stored.sha, stored.where), self.manifest.modules, stored)

    def home_bytes(self, home: str) -> int:
        """Bytes of a home's tensors as stored."""
        kind, _, name = home.partition(":")
        if kind == "cluster":
            cluster = self.manifest.clusters[name]
            return self.manifest.objects[cluster.basis] + self.manifest.objects[cluster.cores]
        members = self.serving_map.members(home).values()
        return sum(self.manifest.objects[self._factors_object(adapter_id).sha] for adapter_id in members)

    def _load_cluster(self, name: str, cluster: Cluster) -> HomeWeights:
        where = f"cluster {name} of {self.address}"
        basis = read_object(self.store, cluster.basis, where)
        cores = read_object(self.store, cluster.cores, where)
        weights: HomeWeights = {}
        for module, core in cores.items():
            U, V = pair_of(basis, module, ("U", "V"), where)
            r_U, r_V = U.shape[-1], V.shape[-1]
            is_diagonal, shape = core.dim() == 2 and r_U == r_V, shape_of(self.manifest.modules, module, where)
            check_shape(where, f"{module}.U", U, (shape.d_out, r_U))
            check_shape(where, f"{module}.V", V, (shape.d_in, r_V))
            check_shape(where, module, core, (cluster.num_slots, r_U) if is_diagonal else (cluster.num_slots, r_U, r_V))
            weights[module] = ModuleWeights(U, V, core)
        if len(basis) != 2 * len(cores):
            raise BundleError(f"{where}: basis holds {len(basis)} tensors for {len(cores)} modules with cores")
        return weights

    def _load_stack(self, members: Mapping[int, str]) -> LoadedHome:
        objects = {slot: self._factors_object(adapter_id) for slot, adapter_id in sorted(members.items())}
        weights, failures = read_factors(self.store, objects, self.manifest.modules)
        if len(failures) == len(objects):
            raise next(iter(failures.values()))
        return LoadedHome(weights, {slot: f"{type(error).__name__}: {error}" for slot, error in failures.items()})

    def _factors_object(self, adapter_id: str) -> FactorsObject:
        adapter = self.manifest.adapters[adapter_id]
        return FactorsObject(str(adapter.factors), int(adapter.rank or 0), f"adapter {adapter_id} of {self.address}")


def current_revision(store: Store, bundle: str) -> int | None:
    """CURRENT's revision of ``bundle``; None where CURRENT names another, or nothing is published. Raises StoreError,
    BundleError."""
    current = read_current(store)
    return current[0].revision if current is not None and current[0].bundle == bundle else None


def standing_revision(store: Store, bundle: str) -> int:
    """What a bundle is opened at: CURRENT's revision of it, else its newest. Were it the newest always, a rollback
    would mean nothing to who pins the bundle. Raises StoreError."""
    try:
        current = current_revision(store, bundle)
    except BundleError:  # a damaged CURRENT says nothing about this bundle
        current = None
    return newest_revision(store, bundle) if current is None else current
