"""Many adapters: clustered in rounds of tasks, fitted in groups of clusters, at any bound of memory the same bytes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import NotEnoughMemory
from compress_jobs.job import cluster, cluster_many, fit, tasks
from compress_jobs.job.run import Outcome
from compress_jobs.report.summary import Summary
from infra.bench.collection import Collection, write
from tests.support.jobs import current_manifest, object_bytes, run_job

pytestmark = pytest.mark.usefixtures("ray_for_jobs")

NUM, CLUSTERS = 120, 4
KIN = Collection(adapters=NUM, layers=2, hidden=64, kv_width=32, rank=4, families=CLUSTERS, common=0.0, family=0.8)


@pytest.fixture(scope="module")
def kin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four families."""
    root = tmp_path_factory.mktemp("kin") / "made"
    write(KIN, root)
    return root


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if these were many: clustered in chunks of 40."""
    monkeypatch.setattr(cluster, "MANY", 16)
    monkeypatch.setattr(cluster_many, "_ADAPTERS_A_TASK", 40)


def run(kin: Path, out: Path, **options: Any) -> Outcome:
    return run_job(kin / "adapters", kin / "base", out, **{"clusters": CLUSTERS, "rank": 8, "gate": 1.0} | options)


def mean_error(out: Path) -> float:
    return sum(adapter["error"] for adapter in current_manifest(out)["adapters"].values()) / NUM


@pytest.fixture(scope="module")
def together(kin: Path, tmp_path_factory: pytest.TempPathFactory, ray_for_jobs: None) -> tuple[Path, Summary]:
    """Clustered in one task, as few are."""
    out = tmp_path_factory.mktemp("together")
    outcome = run(kin, out)
    assert outcome.summary is not None
    return out, outcome.summary


@pytest.mark.slow
@pytest.mark.usefixtures("many")
def test_rounds_find_families_as_one_task_does_and_tell_their_errors(
    kin: Path, tmp_path: Path, together: tuple[Path, Summary]
) -> None:
    summary = run(kin, tmp_path).summary
    assert mean_error(tmp_path) <= 1.05 * mean_error(together[0])
    sizes = Counter(adapter["cluster"] for adapter in current_manifest(tmp_path)["adapters"].values())
    assert len(sizes) == CLUSTERS
    assert max(sizes.values()) <= math.ceil(1.25 * NUM / CLUSTERS)
    assert summary is not None
    assert summary.clustering is not None
    assert summary.random_split is not None
    assert summary.clustering.mean == pytest.approx(mean_error(tmp_path), rel=0.05)
    assert summary.clustering.mean < 0.95 * summary.random_split.mean
    assert [len(row) for row in summary.similarity or []] == [CLUSTERS] * CLUSTERS


@pytest.mark.by_hand
@pytest.mark.slow
@pytest.mark.usefixtures("many")
def test_those_that_are_placed_afterwards_find_their_family(
    kin: Path, tmp_path: Path, together: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_many, "_TOGETHER", 80)
    monkeypatch.setattr(cluster_many, "_A_CLUSTER", 20)
    outcome = run(kin, tmp_path)
    assert outcome.summary is not None
    assert outcome.summary.num_estimated == 80
    assert "both are of clusters of 80 adapters, without those" in "\n".join(outcome.summary.lines(outcome.manifest))
    assert "which are of clusters of 80 adapters, without those" in next(tmp_path.rglob("report.html")).read_text()
    at_random = together[1].random_split
    assert at_random is not None
    assert mean_error(tmp_path) < 0.95 * at_random.mean


@pytest.mark.slow
@pytest.mark.usefixtures("many")
def test_a_clustering_that_was_stopped_goes_on_and_gives_the_same_bytes(
    kin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    undisturbed = run(kin, tmp_path / "undisturbed", in_flight=1)
    work = tmp_path / "out" / "work"
    written: dict[Path, int] = {}
    for step, ends in (("halves_of", 2), ("_measure", 1)):  # in the second round, and after the last
        calls = itertools.count(1)
        does = getattr(cluster_many, step)

        def stop(*given: Any, does: Any = does, ends: int = ends, calls: Any = calls) -> Any:
            if next(calls) == ends:
                raise Stopped
            return does(*given)

        with monkeypatch.context() as patched:
            patched.setattr(cluster_many, step, stop)
            with pytest.raises(Stopped):
                run(kin, tmp_path / "out")
        left = {path: path.stat().st_mtime_ns for path in work.rglob("clustering/**/*.*")}
        assert len(left) > len(written)
        assert written.items() <= left.items()
        written = left
    assert {path.name for path in written} >= {"round-0.json", "round-1.json"}
    assert run(kin, tmp_path / "out").manifest.bundle == undisturbed.manifest.bundle
    assert object_bytes(tmp_path / "out") == object_bytes(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_task_of_little_memory_fits_one_cluster_at_a_time_and_gives_the_same_bytes(
    kin: Path, tmp_path: Path, together: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_PROCESS_BYTES", 1 << 20)
    fitted = []
    held = fit.Group.of
    monkeypatch.setattr(fit.Group, "of", staticmethod(lambda *given: fitted.append(given[0]) or held(*given)))
    run(kin, tmp_path, task_memory="1.7 MB")
    assert fitted == [[cluster] for cluster in range(CLUSTERS)]
    assert object_bytes(tmp_path) == object_bytes(together[0])


@pytest.mark.slow
def test_too_little_memory_for_one_cluster_is_refused_with_the_figure_needed() -> None:
    with pytest.raises(NotEnoughMemory, match=r"--task-memory 100MiB: the largest cluster takes 601MiB to fit"):
        tasks.memory_of_a_task("100MiB", (600 << 20) + 1)
    assert tasks.memory_of_a_task("700MiB", 600 << 20) == 700 << 20
    with pytest.raises(NotEnoughMemory, match=r"the largest cluster takes .* add a larger node"):
        tasks.memory_of_a_task("", 1 << 60)
