"""A collection that changes: add, update, remove, rollback and compact on real adapters, measured densely."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.bundle.manifest import Manifest, served_revision
from cluster.bundle.publish import publish
from cluster.bundle.reading import Bundle
from cluster.bundle.revisions import manifest_key, object_key, read_current
from cluster.hashing import hash_tensors
from cluster.store.address import open_store
from compress_jobs.__main__ import main
from compress_jobs.job import ray_cluster
from compress_jobs.lifecycle import revision
from compress_jobs.lifecycle.compact import Drift
from tests.support.bundles import write_bundle
from tests.support.jobs import (
    copy_adapters,
    current_manifest,
    dense_error,
    dense_modules,
    dense_served,
    object_bytes,
    rewrite,
    run_job,
    scale_factor_b,
)

FITTED = ("number-en", "first-letter", "city-country", "country-fr")


@pytest.fixture(scope="module")
def published(
    base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory, ray_for_jobs: None
) -> tuple[Path, Path]:
    """(collection, out): four adapters on two lossy clusters, ``opt-*`` kept raw by wish. Never to be changed."""
    root = tmp_path_factory.mktemp("published")
    adapters = copy_adapters(zoo_path, root / "adapters", FITTED)
    shutil.copytree(zoo_path / "roman", adapters / "opt-roman")
    run_job(adapters, base_path, root / "out", clusters=2, rank=8, raw=("opt-*",))
    return adapters, root / "out"


@pytest.fixture
def place(published: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of ``published`` to change."""
    return shutil.copytree(published[0], tmp_path / "adapters"), shutil.copytree(published[1], tmp_path / "out")


@pytest.fixture
def call(base_path: Path, place: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command on ``place``; returns what it printed, on stderr too, after checking its exit status."""

    def run(command: str, *more: str, status: int = 0) -> str:
        source = ["--adapters", str(place[0]), "--base", str(base_path)]
        line = [command, str(place[1]), *(source if command in ("add", "update", "compact") else []), *more]
        assert main(line) == status
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def make_like(source: Path, target: Path, noise: float = 0.05) -> None:
    """An adapter near another: its factors with seeded noise, so that a basis fitted on that one holds it."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(7)
    path = target / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {n: t + noise * t.float().std() * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}, path
    )


def assert_errors_are_dense(adapters: Path, out: Path) -> dict[str, Any]:
    manifest = current_manifest(out)
    for adapter_id, adapter in manifest["adapters"].items():
        dense = dense_error(adapters / adapter_id, dense_served(out, manifest, adapter_id))
        assert adapter["error"] == pytest.approx(dense, abs=1e-5), adapter_id
    return manifest


def assert_served_names_the_tensors(out: Path) -> None:
    """Every served revision, computed anew from the objects."""
    bundle = Bundle.open(str(out))
    for adapter_id, adapter in bundle.manifest.adapters.items():
        if adapter.mode == "core":
            cluster = bundle.manifest.clusters[str(adapter.cluster)]
            cores = load_file(out / object_key(cluster.cores))
            expected = served_revision(
                "core", cluster.basis, hash_tensors({m: c[adapter.slot] for m, c in cores.items()})
            )
        else:
            expected = served_revision(adapter.mode, hash_tensors(load_file(out / object_key(str(adapter.factors)))))
        assert adapter.served == expected, adapter_id


def served(manifest: Manifest) -> dict[str, str]:
    return {adapter_id: adapter.served for adapter_id, adapter in manifest.adapters.items()}


def forget_slots(out: Path) -> None:
    """Of the adapters that stand alone, in all manifests."""
    for path in out.glob("bundles/*/revisions/*/manifest.json"):
        document = json.loads(path.read_text())
        for adapter in document["adapters"].values():
            if "factors" in adapter:
                del adapter["slot"]
        path.write_text(json.dumps(document))


# --- add ----------------------------------------------------------------------------------------------------


def test_add_grades_new_adapters_and_shares_all_else_with_the_parent(
    place: tuple[Path, Path], zoo_path: Path, call: Callable[..., str]
) -> None:
    adapters, out = place
    forget_slots(out)  # as manifests were written once
    parent = Bundle.open(str(out)).manifest
    make_like(adapters / "city-country", adapters / "like-city")
    shutil.copytree(zoo_path / "past", adapters / "past")
    shutil.copytree(zoo_path / "date-us", adapters / "opt-date")
    shutil.copytree(zoo_path / "past", adapters / "bad")
    rewrite(adapters / "bad", use_dora=True)
    objects = object_bytes(out)
    printed = call("add")

    child = Bundle.open(str(out)).manifest
    assert (child.bundle, child.revision, child.parent) == (parent.bundle, 1, 0)
    modes = {i: a.mode for i, a in child.adapters.items() if i not in parent.adapters}
    assert modes == {"like-city": "core", "past": "truncated", "opt-date": "raw"}
    alone = {i: (a.rank, a.slot) for i, a in child.adapters.items() if a.mode != "core"}
    assert len(set(alone.values())) == len(alone) > 2
    assert {i: alone[i] for i, a in parent.adapters.items() if a.mode != "core"}.items() <= alone.items()
    assert {a.slot for a in parent.adapters.values() if a.mode != "core"} == {0}
    assert {i: a.added for i, a in child.adapters.items()} == {
        **dict.fromkeys(parent.adapters),
        **dict.fromkeys(modes, 1),
    }
    assert child.adapters["past"].error <= child.method.gate
    assert child.adapters["opt-date"].error == 0
    assert child.refused["bad"].reason == "dora"
    assert "refused    bad (dora)" in printed
    assert f"added      like-city on cluster {child.adapters['like-city'].cluster}, error" in printed

    assert served(parent).items() <= served(child).items()
    changed = child.adapters["like-city"].cluster
    for name, cluster in child.clusters.items():
        assert cluster.basis == parent.clusters[name].basis
        assert (cluster == parent.clusters[name]) == (name != changed)
    assert objects.items() <= object_bytes(out).items()
    assert len(object_bytes(out)) == len(objects) + 3  # the changed cluster's cores, and two that stand alone
    assert_errors_are_dense(adapters, out)
    assert_served_names_the_tensors(out)


def test_add_takes_the_cluster_that_captures_most(place: tuple[Path, Path], call: Callable[..., str]) -> None:
    """Against dense projections on every cluster, in float64."""
    adapters, out = place
    for name in FITTED:
        make_like(adapters / name, adapters / f"like-{name}", noise=0.5)
    call("add")
    manifest = Bundle.open(str(out)).manifest
    taken = set()
    for name in FITTED:
        lost = {}
        for cluster, entry in manifest.clusters.items():
            basis = {n: t.double().numpy() for n, t in load_file(out / object_key(entry.basis)).items()}
            on_it = {}
            for module in {n[:-2] for n in basis}:
                on_it[module] = (basis[f"{module}.U"], basis[f"{module}.V"])
            lost[cluster] = _dense_loss(adapters / f"like-{name}", on_it)
        best = min(lost, key=lambda cluster: lost[cluster])
        adapter = manifest.adapters[f"like-{name}"]
        if adapter.mode == "core":
            assert adapter.cluster == best
            assert adapter.error == pytest.approx(lost[best], abs=2e-3)
            taken.add(best)
        else:
            assert lost[best] > manifest.method.gate - 2e-3
    assert taken == set(manifest.clusters)  # both were chosen by somebody: the choice is one


def _dense_loss(adapter: Path, bases: dict[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Of the best cores there are on these bases: M^ = U (U^+ M V^+T) V^T, whatever their columns are."""
    modules, served = dense_modules(adapter), {}
    for module, (U, V) in bases.items():
        if module in modules:
            core = np.linalg.pinv(U) @ modules[module] @ np.linalg.pinv(V).T
            served[module] = U @ core @ V.T
    return dense_error(adapter, served)


def test_a_module_without_a_basis_counts_as_lost(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    """A lossless cluster over some of an adapter's modules: what the others hold is its error."""
    cut = tmp_path / "cut" / "roman"
    shutil.copytree(zoo_path / "roman", cut)
    tensors = load_file(cut / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if "q_proj" in n}, cut / "adapter_model.safetensors")
    write_bundle(tmp_path / "out", base_path, {"0": {"cut": cut}}, {})
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", ("roman",))
    source = ["--adapters", str(adapters), "--base", str(base_path)]
    assert main(["add", str(tmp_path / "out"), *source]) == 0
    manifest = current_manifest(tmp_path / "out")
    roman = manifest["adapters"]["roman"]
    dense = dense_error(adapters / "roman", dense_served(tmp_path / "out", manifest, "roman"))
    assert roman["mode"] == "core"
    assert roman["error"] == pytest.approx(dense, abs=1e-5)
    assert 0.05 < dense < 0.95
    assert roman["error_worst_module"] == 1
    assert any("v_proj" in module for module in manifest["modules"])


def test_add_onto_diagonal_cores(base_path: Path, zoo_path: Path, tmp_path: Path, ray_for_jobs: None) -> None:
    out, adapters = tmp_path / "out", copy_adapters(zoo_path, tmp_path / "adapters", ("number-en", "country-fr"))
    run_job(adapters, base_path, out, clusters=1, rank=32, method="jd-diag", gate=0.9)
    make_like(adapters / "country-fr", adapters / "like")
    assert main(["add", str(out), "--adapters", str(adapters), "--base", str(base_path)]) == 0
    manifest = Bundle.open(str(out)).manifest
    like = manifest.adapters["like"]
    assert (like.mode, like.added) == ("core", 1)
    cluster = manifest.clusters[str(like.cluster)]
    basis, cores = (load_file(out / object_key(sha)) for sha in (cluster.basis, cluster.cores))
    served = {}
    for module, core in cores.items():
        U, s, V = (t.double().numpy() for t in (basis[f"{module}.U"], core[like.slot], basis[f"{module}.V"]))
        assert s.ndim == 1
        served[module] = U * s @ V.T
    assert like.error == pytest.approx(dense_error(adapters / "like", served), abs=1e-5)
    assert_served_names_the_tensors(out)


def test_tenants_kept_apart_stay_apart(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    """b's adapter is a's own, to the byte, and a's cluster holds it without loss: it must not get there."""
    out, store = tmp_path / "out", open_store(str(tmp_path / "out"))
    clusters = {"0": {"a/one": zoo_path / "roman"}, "1": {"b/one": zoo_path / "past"}}
    written = write_bundle(out, base_path, clusters, {})
    method = dataclasses.replace(written.method, isolation="tenant", gate=0.5)
    apart = dataclasses.replace(written, method=method).with_own_id()
    current = read_current(store)
    assert current is not None
    publish(store, apart, b"{}", current[1])
    for name in ("a/two", "b/two", "c/one", "no-tenant"):
        shutil.copytree(zoo_path / "roman", tmp_path / "adapters" / name)
    assert main(["add", str(out), "--adapters", str(tmp_path / "adapters"), "--base", str(base_path)]) == 0
    added = Bundle.open(str(out)).manifest.adapters
    assert (added["a/two"].mode, added["a/two"].cluster) == ("core", "0")
    assert added["a/two"].error < 1e-5
    for other in ("b/two", "c/one", "no-tenant"):
        assert added[other].mode == "truncated"
        assert added[other].cluster is None


def test_add_names_what_it_cannot_take(place: tuple[Path, Path], call: Callable[..., str], zoo_path: Path) -> None:
    adapters, out = place
    before = (out / "CURRENT").read_bytes()
    assert "nothing to add" in call("add")
    assert "--adapter nobody, nothing: no such folder" in call("add", "--adapter", "nothing", "nobody", status=2)
    assert "--adapter city-country: served already" in call("add", "--adapter", "city-country", status=2)
    shutil.copytree(zoo_path / "past", adapters / "past")
    rewrite(adapters / "past", base_model_name_or_path="some/other-base")
    assert "refused    past (base)" in call("add")  # nobody asked for it by name
    assert "adapter 'past' refused (base)" in call("add", "--adapter", "past", status=1)
    assert (out / "CURRENT").read_bytes() == before
    call("add", "--adapter", "past", "--accept-base", "some/other-base")
    assert "past" in Bundle.open(str(out)).manifest.adapters


def test_another_base_is_refused_by_fingerprint(
    place: tuple[Path, Path], base_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(base_path, tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    assert main(["add", str(place[1]), "--adapters", str(place[0]), "--base", str(other)]) == 2
    assert "the bundle stands on" in capsys.readouterr().err


def test_of_two_adds_that_race_one_wins_and_the_other_says_so_and_nothing_is_lost(
    place: tuple[Path, Path], zoo_path: Path, call: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, out = place
    for name in ("past", "date-us"):
        shutil.copytree(zoo_path / name, adapters / name)

    def other_first(*arguments: Any) -> Manifest:
        monkeypatch.setattr(revision, "publish", publish)
        call("add", "--adapter", "date-us")
        return publish(*arguments)

    monkeypatch.setattr(revision, "publish", other_first)
    assert "revision 1 of bundle" in call("add", "--adapter", "past", status=1)
    assert "date-us" in Bundle.open(str(out)).manifest.adapters
    call("add")
    manifest = assert_errors_are_dense(adapters, out)
    assert {"past", "date-us"} <= manifest["adapters"].keys()
    assert (manifest["revision"], manifest["parent"]) == (2, 1)


# --- remove and update --------------------------------------------------------------------------------------


def test_remove_takes_the_core_out_and_leaves_everybody_else_as_they_were(
    place: tuple[Path, Path], call: Callable[..., str]
) -> None:
    adapters, out = place
    make_like(adapters / "city-country", adapters / "like-city")
    call("add")
    parent = Bundle.open(str(out)).manifest
    gone = parent.adapters["city-country"]
    cores = load_file(out / object_key(parent.clusters[str(gone.cluster)].cores))
    rows = [core[gone.slot].contiguous().view(torch.uint8).numpy().tobytes() for core in cores.values()]
    printed = call("remove", "--adapter", "city-country")
    assert "The bases keep a trace of it" in printed
    assert "`compact --without`" in printed

    child = Bundle.open(str(out)).manifest
    assert served(child) == {i: s for i, s in served(parent).items() if i != "city-country"}
    assert child.clusters[str(gone.cluster)].num_slots == parent.clusters[str(gone.cluster)].num_slots - 1
    new = [(out / object_key(sha)).read_bytes() for sha in child.objects if sha not in parent.objects]
    assert len(new) == 1
    assert not any(row in new[0] for row in rows if any(row))
    assert_errors_are_dense(adapters, out)
    assert_served_names_the_tensors(out)


def test_the_last_of_a_cluster_takes_the_cluster_along(place: tuple[Path, Path], call: Callable[..., str]) -> None:
    _, out = place
    parent = Bundle.open(str(out)).manifest
    members = [i for i, a in parent.adapters.items() if a.cluster == "0"]
    call("remove", "--adapter", *members)
    child = Bundle.open(str(out)).manifest
    assert set(child.clusters) == {"1"}
    assert parent.clusters["0"].basis not in child.objects
    assert "nothing would be left" in call("remove", "--adapter", *child.adapters, status=2)
    assert "--adapter nobody: not in the current revision" in call(
        "remove", "--adapter", "nobody", "opt-roman", status=2
    )
    call("remove", "--adapter", "opt-roman")
    assert "opt-roman" not in Bundle.open(str(out)).manifest.adapters


def test_update_takes_up_what_has_changed_and_only_that(
    place: tuple[Path, Path], call: Callable[..., str], zoo_path: Path
) -> None:
    adapters, out = place
    before = Bundle.open(str(out)).manifest
    assert "nothing to update" in call("update")
    scale_factor_b(adapters / "city-country", -2.0)  # the same subspaces, another change
    rewrite(adapters / "country-fr", lora_alpha=1)  # the weights file is the same
    rewrite(adapters / "number-en", use_dora=True)
    printed = call("update")
    after = Bundle.open(str(out)).manifest
    assert "refused    number-en (dora)" in printed
    changed = {i for i in after.adapters if after.adapters[i].version != before.adapters[i].version}
    assert changed == {"city-country", "country-fr"}
    for name in ("city-country", "country-fr"):
        assert after.adapters[name].added == 1
        assert after.adapters[name].served != before.adapters[name].served
        assert after.adapters[name].error == pytest.approx(before.adapters[name].error, abs=1e-3)
    same = set(after.adapters) - changed
    assert {i: served(after)[i] for i in same} == {i: served(before)[i] for i in same}
    rewrite(adapters / "number-en", use_dora=False)
    shutil.copy(zoo_path / "number-en" / "adapter_config.json", adapters / "number-en")
    assert_errors_are_dense(adapters, out)
    assert_served_names_the_tensors(out)
    assert "--adapter nobody: not in the current revision" in call("update", "--adapter", "nobody", status=2)


# --- rollback -----------------------------------------------------------------------------------------------


def test_rollback_moves_current_back_for_who_pins_the_bundle_too(
    place: tuple[Path, Path], call: Callable[..., str]
) -> None:
    _, out = place
    first = Bundle.open(str(out)).manifest
    call("remove", "--adapter", "city-country")
    second = Bundle.open(str(out)).manifest
    assert "back       city-country" in call("rollback")
    for address in (str(out), f"{out}/bundles/{first.bundle}"):
        assert Bundle.open(address).manifest == first
    assert "has no parent" in call("rollback", status=2)
    assert "no revision 7" in call("rollback", "--to", "7", status=2)
    call("rollback", "--to", "1", "--allow-drop", "1")
    assert Bundle.open(str(out)).manifest == second
    # The next change stands on CURRENT's revision, under a number never used before.
    call("rollback")
    call("remove", "--adapter", "number-en")
    third = Bundle.open(str(out)).manifest
    assert (third.revision, third.parent) == (2, 0)
    assert "city-country" in third.adapters


def test_rollback_to_a_revision_that_is_not_whole_moves_nothing(
    place: tuple[Path, Path], call: Callable[..., str]
) -> None:
    _, out = place
    first = Bundle.open(str(out)).manifest
    call("remove", "--adapter", *(i for i, a in first.adapters.items() if a.cluster == "0"))
    (out / object_key(first.clusters["0"].basis)).unlink()
    before = (out / "CURRENT").read_bytes()
    assert f"missing, such as {first.clusters['0'].basis}" in call("rollback", status=1)
    assert (out / "CURRENT").read_bytes() == before


# --- compact ------------------------------------------------------------------------------------------------


def test_compact_does_nothing_below_its_level_and_says_its_figures(
    place: tuple[Path, Path], call: Callable[..., str]
) -> None:
    adapters, out = place
    assert "drift      0.000, level 0.1\nnothing" in call("compact")
    make_like(adapters / "city-country", adapters / "like-city", noise=0.5)
    call("add")
    drift = Drift.of(Bundle.open(str(out)).manifest)
    manifest = current_manifest(out)["adapters"]
    errors = {i: a["error"] for i, a in manifest.items() if a["mode"] == "core"}
    fitted = np.mean([errors[i] for i in FITTED])
    assert drift.error == pytest.approx(np.mean(list(errors.values())) / fitted - 1)
    assert drift.error > 0
    before = (out / "CURRENT").read_bytes()
    assert f"drift      {drift.figure:.3f}, level 99\nnothing" in call("compact", "--drift", "99")
    assert (out / "CURRENT").read_bytes() == before


def test_drift_counts_what_a_refit_could_change_and_nothing_else(place: tuple[Path, Path]) -> None:
    manifest = Bundle.open(str(place[1])).manifest
    one = manifest.adapters["city-country"]
    alone = dataclasses.replace(
        one, mode="truncated", cluster=None, slot=None, factors=next(iter(manifest.objects)), rank=1
    )
    grown = {
        **{f"f{i}": one for i in range(6)},
        **{f"t{i}": alone for i in range(2)},
        **{f"a{i}": dataclasses.replace(alone, added=1) for i in range(4)},
        **{f"opt-{i}": dataclasses.replace(alone, mode="raw", added=1) for i in range(9)},
    }
    drift = Drift.of(dataclasses.replace(manifest, adapters=grown))
    assert (drift.num_adapters, drift.num_alone) == (12, 6)
    assert drift.alone == pytest.approx(6 / 12 - 2 / 8)
    assert drift.error == 0


def test_compact_without_an_adapter_is_a_run_over_a_collection_that_never_had_it(
    place: tuple[Path, Path],
    call: Callable[..., str],
    base_path: Path,
    zoo_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``past`` is added first, one is removed, one is left out: the new bundle knows nothing of either of these."""
    adapters, out = place
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)  # the module's own Ray is connected
    shutil.copytree(zoo_path / "past", adapters / "past")
    call("add")
    call("remove", "--adapter", "first-letter")
    printed = call("compact", "--without", "opt-roman", "city-country")
    assert "left out   first-letter: removed; `run` or `add` with --restore" in printed
    assert "city-country opt-roman: never read" in printed

    for gone in ("first-letter", "city-country", "opt-roman"):
        shutil.rmtree(adapters / gone)
    method = Bundle.open(str(out)).manifest.method
    fresh = run_job(adapters, base_path, tmp_path / "fresh", clusters=2, rank=8)
    compacted = Bundle.open(str(out)).manifest
    assert compacted.bundle == fresh.manifest.bundle
    assert method == fresh.manifest.method
    new = {object_key(sha).removeprefix("objects/"): (out / object_key(sha)).read_bytes() for sha in compacted.objects}
    assert new == object_bytes(tmp_path / "fresh")
    text = (out / manifest_key(compacted.bundle, 0)).read_text()
    assert not any(gone in text for gone in ("first-letter", "city-country", "opt-"))

    shutil.rmtree(adapters / "past")
    assert "past (it has no folder)" in call("compact", "--without", "number-en", status=1)
    assert "--without nobody: neither served" in call("compact", "--without", "nobody", status=2)
