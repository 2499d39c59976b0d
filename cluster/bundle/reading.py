"""Reading a bundle: from its address to verified tensors.

Every object is checked against its hash, its tensors against the manifest: a reader never hands on bytes
that the job did not write.
"""

from __future__ import annotations

import re

from torch import Tensor

from cluster.bundle.manifest import Adapter, Cluster, Manifest
from cluster.bundle.revisions import newest_revision, parse_current, read_current, read_manifest, read_object
from cluster.bundle.serving_map import ServingMap
from cluster.errors import BundleError, ConfigError, StoreMissing
from cluster.layer import ModuleWeights
from cluster.store.address import open_store
from cluster.store.protocol import Store

HomeWeights = dict[str, ModuleWeights]
"""Module name -> its weights, for one home."""

_PINNED = re.compile(r"(?P<out>.+)/bundles/(?P<bundle>b-[0-9a-f]{16})/?")


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
            number = _standing_revision(store, bundle) if revision is None else revision
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

    def load_home(self, home: str) -> HomeWeights:
        """The verified tensors of a home (``cluster:0``, ``factors:odd-one``), on the CPU, as stored."""
        kind, _, name = home.partition(":")
        if kind == "cluster" and name in self.manifest.clusters:
            return self._load_cluster(name, self.manifest.clusters[name])
        if kind == "factors" and name in self.manifest.adapters and self.manifest.adapters[name].factors:
            return self._load_factors(name, self.manifest.adapters[name])
        raise BundleError(f"{self.address}: no home {home!r} in revision {self.manifest.revision}")

    def home_bytes(self, home: str) -> int:
        """Bytes of a home's tensors as stored."""
        kind, _, name = home.partition(":")
        if kind == "cluster":
            cluster = self.manifest.clusters[name]
            return self.manifest.objects[cluster.basis] + self.manifest.objects[cluster.cores]
        return self.manifest.objects[str(self.manifest.adapters[name].factors)]

    def _load_cluster(self, name: str, cluster: Cluster) -> HomeWeights:
        where = f"cluster {name} of {self.address}"
        basis = read_object(self.store, cluster.basis, where)
        cores = read_object(self.store, cluster.cores, where)
        weights: HomeWeights = {}
        for module, core in cores.items():
            U, V = _pair(basis, module, ("U", "V"), where)
            r_U, r_V = U.shape[-1], V.shape[-1]
            is_diagonal = core.dim() == 2 and r_U == r_V
            self._check_shape(where, f"{module}.U", U, (self._shape(module, where)[0], r_U))
            self._check_shape(where, f"{module}.V", V, (self._shape(module, where)[1], r_V))
            self._check_shape(
                where, module, core, (cluster.num_slots, r_U) if is_diagonal else (cluster.num_slots, r_U, r_V)
            )
            weights[module] = ModuleWeights(U, V, core)
        if len(basis) != 2 * len(cores):
            raise BundleError(f"{where}: basis holds {len(basis)} tensors for {len(cores)} modules with cores")
        return weights

    def _load_factors(self, name: str, adapter: Adapter) -> HomeWeights:
        where = f"adapter {name} of {self.address}"
        factors = read_object(self.store, str(adapter.factors), where)
        weights: HomeWeights = {}
        for module in sorted({key.rpartition(".")[0] for key in factors}):
            A, B = _pair(factors, module, ("A", "B"), where)
            q = A.shape[0]
            self._check_shape(where, f"{module}.A", A, (q, self._shape(module, where)[1]))
            self._check_shape(where, f"{module}.B", B, (self._shape(module, where)[0], q))
            weights[module] = ModuleWeights(U=B, V=A.T.contiguous(), cores=None)
        return weights

    def _shape(self, module: str, where: str) -> tuple[int, int]:
        shape = self.manifest.modules.get(module)
        if shape is None:
            raise BundleError(f"{where}: tensors of module {module!r}, which the manifest does not list")
        return shape.d_out, shape.d_in

    @staticmethod
    def _check_shape(where: str, tensor_name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != expected or not tensor.is_floating_point():
            raise BundleError(
                f"{where}: tensor {tensor_name} is {tensor.dtype} {tuple(tensor.shape)}, expected {expected}"
            )


def _standing_revision(store: Store, bundle: str) -> int:
    """What a bundle is opened at: were it the newest always, a rollback would mean nothing to who pins the bundle."""
    try:
        current = read_current(store)
    except BundleError:  # a damaged CURRENT says nothing about this bundle
        current = None
    if current is not None and current[0].bundle == bundle:
        return current[0].revision
    return newest_revision(store, bundle)


def _pair(tensors: dict[str, Tensor], module: str, names: tuple[str, str], where: str) -> tuple[Tensor, Tensor]:
    try:
        first, second = (tensors[f"{module}.{name}"] for name in names)
    except KeyError as error:
        raise BundleError(f"{where}: tensor {error} is missing") from None
    if first.dim() != 2 or second.dim() != 2:
        raise BundleError(f"{where}: {module} has factors of {first.dim()} and {second.dim()} dimensions, expected 2")
    return first, second
