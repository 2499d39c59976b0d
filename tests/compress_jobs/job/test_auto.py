"""The job when it chooses for itself, keeps tenants apart, and leaves adapters out; and what ``plan`` says before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.adapters.base import read_base
from cluster.adapters.listing import list_adapters
from cluster.adapters.reading import read_adapter
from cluster.compression.choose import CollectionShape
from cluster.compression.clustering import adapter_errors, assign
from cluster.compression.sample import Sample
from cluster.compression.stack import stack_factors
from cluster.errors import ConfigError
from cluster.store.address import open_store
from compress_jobs.__main__ import main
from tests.support.jobs import FEW, copy_adapters, current_manifest, dense_error, dense_served, object_bytes, run_job

pytestmark = pytest.mark.usefixtures("ray_for_jobs")
AUTO = {"clusters": "auto", "rank": "auto", "method": "auto"}


def confirmed_mean(out: Path, adapters: Path) -> float:
    """By dense reconstruction of the published objects."""
    manifest = current_manifest(out)
    return float(np.mean([dense_error(adapters / i, dense_served(out, manifest, i)) for i in manifest["adapters"]]))


def report(out: Path) -> dict[str, object]:
    current = json.loads((out / "CURRENT").read_text())
    path = out / "bundles" / current["bundle"] / "revisions" / "0" / "report.json"
    found: dict[str, object] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_a_shared_basis_is_chosen_to_meet_the_target_and_the_choice_is_recorded(
    base_path: Path, zoo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters, out = copy_adapters(zoo_path, tmp_path / "adapters"), tmp_path / "out"
    options = {"clusters": "auto", "rank": "auto", "target_error": 0.1, "gate": 1.0}
    outcome = run_job(adapters, base_path, out, **options)
    method = outcome.manifest.method
    assert (method.auto, method.target_error) == (("clusters", "rank"), 0.1)
    assert method.name == "jd-full"
    assert confirmed_mean(out, adapters) <= 0.1
    choices = report(out)["choices"]
    assert isinstance(choices, list)
    chosen = [choice for choice in choices if choice["chosen"]]
    assert [(choice["clusters"], choice["rank"]) for choice in chosen] == [(method.clusters, method.rank)]
    assert chosen[0]["confirmed_error"] == pytest.approx(confirmed_mean(out, adapters), abs=1e-4)
    # Its bytes are those of the published tensors; what the files hold besides is their headers.
    headers = sum(8 + int.from_bytes(data[:8], "little") for data in object_bytes(out).values())
    assert chosen[0]["size_bytes"] == sum(map(len, object_bytes(out).values())) - headers
    assert "weighed  jd-full, 1 clusters" in capsys.readouterr().err
    page = next(out.rglob("report.html")).read_text()
    assert f"It chose jd-full, {method.clusters} cluster" in page
    assert "Left out" not in page
    again = run_job(adapters, base_path, out, **options)
    assert again.summary is None


def test_plain_svd_is_taken_where_it_takes_fewer_bytes(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    """Two adapters near rank 2 share nothing that would pay for a basis."""
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:2])
    outcome = run_job(adapters, base_path, tmp_path / "out", target_error=0.2, **AUTO)
    assert outcome.manifest.method.name == "svd"
    assert confirmed_mean(tmp_path / "out", adapters) <= 0.2
    assert all(adapter.mode == "truncated" for adapter in outcome.manifest.adapters.values())


def test_a_target_that_nothing_meets_is_refused_with_the_nearest(
    base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:3])
    with pytest.raises(ConfigError, match=r"nothing that was weighed meets it.*the nearest is svd, rank 4"):
        run_job(adapters, base_path, tmp_path / "out", clusters=2, rank=4, method="auto", target_error=0.01)
    assert not (tmp_path / "out" / "CURRENT").exists()


def test_tenants_stay_out_of_each_others_clusters(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    for name in FEW[:4]:
        shutil.copytree(zoo_path / name, adapters / ("red" if name in FEW[:2] else "blue") / name)
    shutil.copytree(zoo_path / FEW[4], adapters / FEW[4])
    outcome = run_job(adapters, base_path, tmp_path / "out", clusters=4, rank=8, isolate="tenant", gate=1.0)
    assert outcome.manifest.method.isolation == "tenant"
    owners: dict[str | None, set[str]] = {}
    for adapter_id, adapter in outcome.manifest.adapters.items():
        owners.setdefault(adapter.cluster, set()).add(adapter_id.rpartition("/")[0])
    assert len(owners) == 4
    assert all(len(tenants) == 1 for tenants in owners.values())


def test_an_adapter_left_out_leaves_no_trace(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:3])
    run_job(adapters, base_path, tmp_path / "left-out", rank=8, without=(FEW[0],))
    shutil.rmtree(adapters / FEW[0])
    run_job(adapters, base_path, tmp_path / "deleted", rank=8)
    assert object_bytes(tmp_path / "left-out") == object_bytes(tmp_path / "deleted")
    assert current_manifest(tmp_path / "left-out")["bundle"] == current_manifest(tmp_path / "deleted")["bundle"]


def test_plan_predicts_what_the_run_then_finds(
    base_path: Path, zoo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")
    shutil.copytree(zoo_path / "add", adapters / "broken")
    (adapters / "broken" / "adapter_config.json").write_text("{}")
    line = ["plan", "--adapters", str(adapters), "--base", str(base_path), "--device-memory", "1GiB"]
    assert main(line) == 0
    text = capsys.readouterr().out
    figures = json.loads(text.splitlines()[-1])
    assert (figures["adapters"], figures["refused_in_sample"], figures["to_serve"]) == (7, 1, 6)
    assert "refused    broken (" in text
    planned = {(c["method"], c["clusters"], c["rank"]): c for c in figures["choices"]}
    run_job(adapters, base_path, tmp_path / "out", rank=16, gate=1.0, without=("broken",))
    found = planned["jd-full", 1, 16]
    assert confirmed_mean(tmp_path / "out", adapters) == pytest.approx(found["error"], rel=0.1)
    headers = sum(8 + int.from_bytes(data[:8], "little") for data in object_bytes(tmp_path / "out").values())
    assert found["size_bytes"] == sum(map(len, object_bytes(tmp_path / "out").values())) - headers
    assert main([*line[:-1], "lots"]) == 2
    assert main([*line[:-1], "100MB"]) == 2


@pytest.mark.by_hand
@pytest.mark.slow
def test_the_choice_is_within_a_fifth_of_the_best_that_exhaustive_search_finds(
    base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    """Every number of clusters up to half the adapters, every rank, on all modules, by full clustering."""
    target = 0.05
    run_job(zoo_path, base_path, tmp_path / "out", clusters="auto", rank="auto", target_error=target, gate=1.0)
    assert confirmed_mean(tmp_path / "out", zoo_path) <= target
    choices = report(tmp_path / "out")["choices"]
    assert isinstance(choices, list)
    chosen = next(choice for choice in choices if choice["chosen"])

    store, base = open_store(str(zoo_path)), read_base(str(base_path))
    read = [read_adapter(store, files, base) for files in list_adapters(store).adapters]
    modules = sorted({module for _, factors in read for module in factors})
    stacks = {m: stack_factors([(i, f[m]) for i, (_, f) in enumerate(read) if m in f]) for m in modules}
    everything = Sample.of({m: stack for m, stack in stacks.items() if stack is not None}, len(read))
    sampled = Sample.of({m: stack for m, stack in stacks.items() if stack is not None and ".15." in m}, len(read))
    shape = CollectionShape.of([record for record, _ in read], base.modules, itemsize=2)
    best = None
    for k in range(1, len(read) // 2 + 1):
        labels = assign(sampled, k, 10, seed=0).labels
        for rank in range(1, 60):
            size = shape.joint_bytes(labels, rank, diagonal=False)
            if best is not None and size >= best:
                break
            if adapter_errors(sampled, labels, rank, 0).mean() > 1.5 * target:
                continue  # far from it already where it is quick to see
            if adapter_errors(everything, labels, rank, 0).mean() <= target:
                best = size
                break
    assert best is not None
    assert chosen["size_bytes"] <= 1.2 * best
