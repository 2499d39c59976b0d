"""Generated collections: what they claim of themselves is there in the files, and the border accepts every adapter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cluster.adapters.base import read_base
from cluster.adapters.factors import Factors
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import read_adapter
from cluster.errors import ConfigError
from cluster.store.address import open_store
from infra.bench.collection import Collection, traits, write
from tests.support.dense import Dense, dense

SPEC = Collection(adapters=60, layers=2, hidden=256, kv_width=128, rank=8, families=4, family=0.4, light=0.5, seed=3)
TRAITS = [traits(SPEC, index) for index in range(SPEC.adapters)]
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collection") / "new"
    write(SPEC, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(collection: Path) -> list[dict[str, Factors]]:
    """Every adapter as the job reads it; a refused one would raise."""
    store = open_store(str(collection / "adapters"))
    base = read_base(str(collection / "base"))
    return [read_adapter(store, files, base)[1] for files in list_adapters(store).adapters]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted((folder / "adapters").rglob("*.*"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def cosines(matrices: list[Dense]) -> NDArray[np.float64]:
    rows = np.stack([matrix.ravel() / np.linalg.norm(matrix) for matrix in matrices])
    return rows @ rows.T


def pairs(condition: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pairs above the diagonal for which it holds."""
    return np.triu(condition, 1)


def test_every_adapter_is_accepted_with_every_module_at_its_shape(adapters: list[dict[str, Factors]]) -> None:
    assert len(adapters) == SPEC.adapters
    for factors in adapters:
        assert {module: (B.shape[0], A.shape[1]) for module, (A, B) in factors.items()} == SPEC.modules
        assert all(A.shape[0] == B.shape[1] == SPEC.rank for A, B in factors.values())


def test_the_base_takes_no_disk(collection: Path) -> None:
    stat = (collection / "base" / "model.safetensors").stat()
    assert stat.st_size > 2 * sum(d_out * d_in for d_out, d_in in SPEC.modules.values())
    assert stat.st_blocks * 512 < 65536


@pytest.mark.parametrize("module", MODULES)
def test_spectra_and_norms_are_those_of_each_adapters_traits(module: str, adapters: list[dict[str, Factors]]) -> None:
    j = np.arange(1, SPEC.rank + 1)
    for factors, own in zip(adapters, TRAITS, strict=True):
        energies = np.linalg.svd(dense(factors[module]), compute_uv=False)[: SPEC.rank] ** 2
        expected = own.norm**2 * j**-own.exponent / (j**-own.exponent).sum()
        np.testing.assert_allclose(energies, expected, rtol=0.05, atol=1e-4 * own.norm**2)  # stored in bfloat16


def test_light_adapters_are_nearer_to_rank_2_than_long_trained_ones(adapters: list[dict[str, Factors]]) -> None:
    shares: dict[bool, list[float]] = {True: [], False: []}
    for factors, own in zip(adapters, TRAITS, strict=True):
        energies = np.linalg.svd(dense(factors[MODULES[0]]), compute_uv=False) ** 2
        shares[own.is_light].append(float(energies[2:].sum() / energies.sum()))
    # Of 8: exponent 2.8 leaves 0.07 beyond the second, 2.0 leaves 0.18.
    assert np.mean(shares[True]) == pytest.approx(0.07, abs=0.03)
    assert np.mean(shares[False]) == pytest.approx(0.18, abs=0.03)


def test_the_adapters_of_one_init_are_told_by_that_factor_alone(adapters: list[dict[str, Factors]]) -> None:
    together = cosines([factors[MODULES[0]][0].double().numpy() for factors in adapters])
    shares = np.array([own.shares_init for own in TRAITS])
    both = shares[:, None] & shares[None, :]
    assert together[pairs(both)].min() > 0.7
    assert np.median(together[pairs(both)]) == pytest.approx(1 - SPEC.moved, abs=0.05)
    assert together[pairs(~both)].max() < 0.3
    large = [traits(Collection(shared_init=0.38), index).shares_init for index in range(2000)]
    assert np.mean(large) == pytest.approx(0.38, abs=0.03)


@pytest.mark.parametrize("module", MODULES)
def test_adapters_of_a_family_share_output_directions(module: str, adapters: list[dict[str, Factors]]) -> None:
    # The projections on the column spaces of B: <P_i, P_j> is the sum of squared cosines between them.
    spaces = [np.linalg.qr(factors[module][1].double().numpy())[0] for factors in adapters]
    overlap = cosines([space @ space.T for space in spaces])
    family = np.array([own.family for own in TRAITS])
    same = family[:, None] == family[None, :]
    assert set(family) == set(range(SPEC.families))
    assert overlap[pairs(same)].mean() > 1.25 * overlap[pairs(~same)].mean()
    # And everybody shares something: more than two random subspaces of this size would.
    assert overlap[pairs(~same)].mean() > 1.15 * SPEC.rank / len(spaces[0])


def test_a_seed_gives_the_same_bytes_and_a_smaller_collection_is_the_beginning_of_a_larger(tmp_path: Path) -> None:
    small = {"layers": 1, "hidden": 64, "kv_width": 32, "rank": 4}
    for name, spec in {
        "three": Collection(adapters=3, **small),
        "again": Collection(adapters=3, **small),
        "four": Collection(adapters=4, **small),
        "other": Collection(adapters=3, **small, seed=1),
    }.items():
        write(spec, tmp_path / name)
    three, four, other = hashes(tmp_path / "three"), hashes(tmp_path / "four"), hashes(tmp_path / "other")
    assert three == hashes(tmp_path / "again")
    assert three.items() < four.items()
    weights = [name for name in three if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert all(three[name] != other[name] for name in weights)


@pytest.mark.parametrize(
    ("choices", "named"),
    [
        ({"adapters": 0}, "--adapters is 0"),
        ({"rank": 2048}, "--rank is 2048"),
        ({"shared_init": 1.5}, "--shared-init is 1.5"),
        ({"common": 0.6, "family": 0.6}, "--family is 0.6; expected at most 1 - --common (0.4)"),
    ],
)
def test_an_impossible_choice_is_refused_by_name(choices: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match="expected") as refused:
        Collection(**choices)  # type: ignore[arg-type]
    assert named in str(refused.value)


def test_what_exists_is_not_written_over(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists"):
        write(SPEC, tmp_path)
