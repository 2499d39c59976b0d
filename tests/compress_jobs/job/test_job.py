"""The compression job on real adapters and a real Ray: what it publishes is what it says."""

from __future__ import annotations

import json
import pickle
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from safetensors.torch import load_file

from cluster.bundle.reading import Bundle
from cluster.errors import BundleError, ConfigError, StoreMissing
from compress_jobs.__main__ import main
from compress_jobs.job import ray_cluster, run, tasks
from compress_jobs.job.choose import Chosen
from compress_jobs.job.cluster import Clustered, cluster_all
from compress_jobs.job.options import RunOptions
from compress_jobs.job.prepare import Job, prepare
from compress_jobs.job.run import Outcome
from tests.support.jobs import (
    FEW,
    copy_adapters,
    current_manifest,
    dense_error,
    dense_modules,
    dense_served,
    object_bytes,
    rewrite,
    run_job,
    scale_factor_b,
    singular_energies,
)

pytestmark = pytest.mark.usefixtures("ray_for_jobs")
OPTIONS = {"clusters": 2, "rank": 16}
RESUMED = {"clusters": 2, "rank": 8, "gate": 0.05}  # some end on a basis, some are truncated


@pytest.fixture(scope="module")
def published(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """All shipped adapters, two clusters of rank 16, one opted out."""
    out = tmp_path_factory.mktemp("published")
    return out, run_job(zoo_path, base_path, out, raw=("add",), **OPTIONS)


def test_every_error_in_the_manifest_is_what_a_dense_reconstruction_of_the_objects_gives(
    published: tuple[Path, Outcome], zoo_path: Path
) -> None:
    out, _ = published
    manifest = current_manifest(out)
    assert set(manifest["adapters"]) == {folder.name for folder in zoo_path.iterdir()}
    for adapter_id, adapter in manifest["adapters"].items():
        dense = dense_error(zoo_path / adapter_id, dense_served(out, manifest, adapter_id))
        assert adapter["error"] == pytest.approx(dense, abs=1e-5), adapter_id


def test_the_summary_counts_what_was_published(published: tuple[Path, Outcome], zoo_path: Path) -> None:
    out, outcome = published
    summary, manifest = outcome.summary, outcome.manifest
    assert summary is not None
    assert (summary.num_adapters, summary.num_on_basis, summary.num_raw, summary.num_refused) == (12, 11, 1, 0)
    assert summary.bytes_before == sum(path.stat().st_size for path in zoo_path.rglob("*.safetensors"))
    assert summary.bytes_after == sum(len(data) for data in object_bytes(out).values())
    errors = {i: a.error for i, a in manifest.adapters.items() if a.mode == "core"}
    assert summary.served is not None
    assert summary.served.mean == pytest.approx(np.mean(list(errors.values())))
    assert (summary.served.worst, summary.served.worst_adapter) == max((e, i) for i, e in errors.items())
    assert summary.random_split is not None
    assert summary.svd_equal_bytes is not None
    report = json.loads(next((out / "bundles").rglob("report.json")).read_text())
    assert report["bundle"] == manifest.bundle
    assert "\n".join(summary.lines(manifest)).count("raw") >= 2


def test_the_svd_figure_is_what_truncating_every_adapter_in_those_bytes_leaves(
    published: tuple[Path, Outcome], zoo_path: Path
) -> None:
    """Independently: all components of all adapters by gain a byte, until the bytes are spent."""
    out, outcome = published
    manifest = current_manifest(out)
    raw_bytes = manifest["objects"][manifest["adapters"]["add"]["factors"]]["size_bytes"]
    budget = sum(entry["size_bytes"] for entry in manifest["objects"].values()) - raw_bytes
    components, lost = [], {}
    shapes = {module: shape["d_out"] + shape["d_in"] for module, shape in manifest["modules"].items()}
    for name in set(manifest["adapters"]) - {"add"}:
        modules = singular_energies(zoo_path / name)
        total = sum(float(energies.sum()) for energies in modules.values())
        lost[name] = 1.0
        for module, energies in modules.items():
            cost = 2 * shapes[module]  # bytes of a pair of bfloat16 vectors
            components += [(gain / cost, gain, cost, name) for gain in energies / total]
    spent = 0
    for _, gain, cost, name in sorted(components, reverse=True):
        spent += cost
        if spent > budget:
            break
        lost[name] -= gain
    assert outcome.summary is not None
    assert outcome.summary.svd_equal_bytes is not None
    assert outcome.summary.svd_equal_bytes.mean == pytest.approx(np.mean(list(lost.values())), abs=1e-4)


def test_a_second_run_publishes_nothing_new(
    published: tuple[Path, Outcome], base_path: Path, zoo_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, first = published
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and ".cts" not in path.name}
    again = run_job(zoo_path, base_path, out, raw=("add",), **OPTIONS)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and ".cts" not in path.name}
    assert again.summary is None
    assert again.manifest == first.manifest
    assert after == before


def test_a_lost_object_makes_the_next_run_restore_it(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:3])
    first = run_job(adapters, base_path, tmp_path / "out", rank=8)
    before = object_bytes(tmp_path / "out")
    next((tmp_path / "out" / "objects").glob("*.safetensors")).unlink()
    again = run_job(adapters, base_path, tmp_path / "out", rank=8)
    assert again.manifest == first.manifest
    assert object_bytes(tmp_path / "out") == before


def test_same_inputs_and_seed_give_the_same_bytes(
    published: tuple[Path, Outcome], base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    out, first = published
    second = run_job(zoo_path, base_path, tmp_path / "out", raw=("add",), in_flight=1, **OPTIONS)
    assert object_bytes(tmp_path / "out") == object_bytes(out)
    assert second.manifest.bundle == first.manifest.bundle


def test_lossless_where_the_rank_holds_every_adapter(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")
    run_job(adapters, base_path, tmp_path / "out", rank=64, dtype="float32")
    manifest = current_manifest(tmp_path / "out")
    for adapter_id, adapter in manifest["adapters"].items():
        assert adapter["error"] < 1e-6  # of float32 products
        assert dense_error(adapters / adapter_id, dense_served(tmp_path / "out", manifest, adapter_id)) < 1e-9


def test_adapters_beyond_the_gate_are_cut_to_the_smallest_rank_that_meets_it(
    base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")
    outcome = run_job(adapters, base_path, tmp_path / "out", rank=4, gate=0.05)
    manifest = current_manifest(tmp_path / "out")
    truncated = {i: a for i, a in manifest["adapters"].items() if a["mode"] == "truncated"}
    assert len(truncated) >= 3
    for adapter_id, adapter in truncated.items():
        assert adapter["error"] == pytest.approx(
            dense_error(adapters / adapter_id, dense_served(tmp_path / "out", manifest, adapter_id)), abs=1e-5
        )
        tails = list(singular_energies(adapters / adapter_id).values())
        total = sum(float(t.sum()) for t in tails)
        assert sum(float(t[adapter["rank"] :].sum()) for t in tails) / total <= 0.05
        assert sum(float(t[adapter["rank"] - 1 :].sum()) for t in tails) / total > 0.05
    assert all(a["error"] <= 0.0501 for a in manifest["adapters"].values())
    assert outcome.summary is not None
    assert outcome.summary.num_truncated == len(truncated)


def test_svd_alone_cuts_every_adapter_to_the_rank(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")
    run_job(adapters, base_path, tmp_path / "out", method="svd", rank=2)
    manifest = current_manifest(tmp_path / "out")
    assert manifest["clusters"] == {}
    for adapter_id, adapter in manifest["adapters"].items():
        assert (adapter["mode"], adapter["rank"]) == ("truncated", 2)
        dense = dense_error(adapters / adapter_id, dense_served(tmp_path / "out", manifest, adapter_id))
        assert adapter["error"] == pytest.approx(dense, abs=1e-5)


def test_a_raw_adapter_is_served_bit_for_bit(published: tuple[Path, Outcome], zoo_path: Path) -> None:
    out, _ = published
    manifest = current_manifest(out)
    assert manifest["adapters"]["add"]["error"] == 0
    served = dense_served(out, manifest, "add")
    assert all(np.array_equal(served[module], M) for module, M in dense_modules(zoo_path / "add").items())


def test_bad_adapters_are_named_and_never_stop_the_others(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", ("number-en", "past"))
    for name in ("dora", "other-base", "zero", "huge", "truncated", "claims-1tb", "no-config", "pickled"):
        copy_adapters(zoo_path, tmp_path / "more", ("roman",))
        (tmp_path / "more" / "roman").rename(adapters / name)
    rewrite(adapters / "dora", use_dora=True)
    rewrite(adapters / "other-base", base_model_name_or_path="meta-llama/Llama-3.1-8B")
    scale_factor_b(adapters / "zero", 0)
    scale_factor_b(adapters / "huge", 1e30)
    weights = adapters / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    weights = adapters / "claims-1tb" / "adapter_model.safetensors"
    weights.write_bytes((10**12).to_bytes(8, "little") + weights.read_bytes()[8:])
    (adapters / "no-config" / "adapter_config.json").unlink()
    (adapters / "pickled" / "adapter_model.safetensors").rename(adapters / "pickled" / "adapter_model.bin")

    outcome = run_job(adapters, base_path, tmp_path / "out", rank=16, max_refused="8")
    assert {adapter_id: refused.reason for adapter_id, refused in outcome.manifest.refused.items()} == {
        "dora": "dora",
        "other-base": "base",
        "zero": "zero",
        "huge": "not-finite",
        "truncated": "corrupt",
        "claims-1tb": "corrupt",
        "no-config": "no-config",
        "pickled": "pickle",
    }
    assert set(outcome.manifest.adapters) == {"number-en", "past"}
    assert outcome.summary is not None
    printed = "\n".join(outcome.summary.lines(outcome.manifest))
    assert all(adapter_id in printed for adapter_id in outcome.manifest.refused)


def test_an_adapter_replaced_during_the_job_is_named_and_the_others_are_served(
    base_path: Path, zoo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")

    def replace_then_cluster(job: Job, chosen: Chosen) -> Clustered | None:
        scale_factor_b(adapters / "past", 2.0)
        return cluster_all(job, chosen)

    monkeypatch.setattr(run, "cluster_all", replace_then_cluster)
    outcome = run_job(adapters, base_path, tmp_path / "out", rank=16)
    assert outcome.manifest.refused["past"].reason == "changed"
    assert set(outcome.manifest.adapters) == set(FEW) - {"past"}
    manifest = current_manifest(tmp_path / "out")
    for adapter_id, adapter in manifest["adapters"].items():
        dense = dense_error(adapters / adapter_id, dense_served(tmp_path / "out", manifest, adapter_id))
        assert adapter["error"] == pytest.approx(dense, abs=1e-5)
    # And the next run takes it in.
    monkeypatch.undo()
    assert set(run_job(adapters, base_path, tmp_path / "out", rank=16).manifest.adapters) == set(FEW)


@pytest.mark.slow
def test_of_twins_that_saw_the_same_change_the_slower_one_ends_well(
    base_path: Path, zoo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", (*FEW[:2], "past"))
    options = RunOptions(adapters=str(adapters), base=str(base_path), out=str(tmp_path / "out"), rank=8)
    slower, faster = prepare(options), prepare(options)
    published = []

    def replace_then_cluster(job: Job, chosen: Chosen) -> Clustered | None:
        scale_factor_b(adapters / "past", 2.0)
        return cluster_all(job, chosen)

    def other_first(*_: object) -> None:
        monkeypatch.undo()
        published.append(run.run(faster).manifest)
        raise StoreMissing("a part that the other one has tidied up")

    monkeypatch.setattr(run, "cluster_all", replace_then_cluster)
    monkeypatch.setattr(run, "assemble_all", other_first)
    outcome = run.run(slower)
    assert outcome.summary is None
    assert [outcome.manifest] == published
    assert outcome.manifest.refused["past"].reason == "changed"
    assert parts_of(tmp_path / "out") == {}


@pytest.mark.parametrize("changing", [("past",), ("city-country", "country-id", "past")], ids=["one", "all"])
def test_modules_that_only_changed_adapters_touch_are_left_out_and_nothing_else(
    base_path: Path,
    zoo_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changing: tuple[str, ...],
) -> None:
    """Of these three only ``past`` has k_proj."""
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", ("city-country", "country-id", "past"))

    def replace_then_cluster(job: Job, chosen: Chosen) -> Clustered | None:
        for name in changing:
            scale_factor_b(adapters / name, 2.0)
        return cluster_all(job, chosen)

    monkeypatch.setattr(run, "cluster_all", replace_then_cluster)
    if len(changing) == 3:
        with pytest.raises(BundleError, match="every adapter changed during the job"):
            run_job(adapters, base_path, tmp_path / "out", rank=8)
        assert not (tmp_path / "out" / "CURRENT").exists()
        return
    manifest = run_job(adapters, base_path, tmp_path / "out", rank=8).manifest
    assert set(manifest.adapters) == {"city-country", "country-id"}
    assert not any("k_proj" in module for module in manifest.modules)


def test_of_two_jobs_racing_for_current_one_wins_and_the_other_says_so(
    base_path: Path, zoo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:3])
    out = tmp_path / "out"
    winner: list[str] = []

    def other_job_first(*arguments: object) -> object:
        monkeypatch.setattr(run, "publish", publish)
        winner.append(run_job(adapters, base_path, out, rank=4).manifest.bundle)
        return publish(*arguments)  # type: ignore[arg-type]

    publish = run.publish
    monkeypatch.setattr(run, "publish", other_job_first)
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)
    places = {"--adapters": str(adapters), "--base": str(base_path), "--out": str(out)}
    status = main(["run", *(word for pair in places.items() for word in pair), "--rank", "8", "--gate", "0.25"])
    assert status == 1
    assert "was moved to bundle " + winner[0] in capsys.readouterr().err
    assert Bundle.open(str(out)).manifest.bundle == winner[0]


def test_no_tensor_of_the_collection_passes_through_the_driver(
    base_path: Path, zoo_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that tasks send back, together, is small beside the collection."""
    received: list[int] = []

    def counted(reference: object) -> object:
        result = original(reference)
        received.append(len(pickle.dumps(result)))
        return result

    original = tasks._result
    monkeypatch.setattr(tasks, "_result", counted)
    outcome = run_job(zoo_path, base_path, tmp_path / "out", **OPTIONS)
    assert outcome.summary is not None
    assert sum(received) < 0.05 * outcome.summary.bytes_before


def test_an_export_is_what_is_served_as_peft_reads_it(
    published: tuple[Path, Outcome], base_path: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    out, _ = published
    manifest = current_manifest(out)
    for adapter_id in ("roman", "city-country", "add"):
        target = tmp_path / adapter_id
        assert main(["export", str(out), "--adapter", adapter_id, "--to", str(target)]) == 0
        served = dense_served(out, manifest, adapter_id)
        exported = load_file(target / "adapter_model.safetensors")
        config = LoraConfig.from_pretrained(str(target))
        assert config.base_model_name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
        touched = {module for module, M in served.items() if M.any()}
        assert set(config.target_modules or ()) == touched
        for module in touched:
            A, B = (exported[f"base_model.model.{module}.lora_{f}.weight"].double().numpy() for f in "AB")
            np.testing.assert_allclose(B @ A, served[module], atol=1e-6 * np.abs(served[module]).max())
    assert main(["export", str(out), "--adapter", "add", "--to", str(tmp_path / "add")]) == 2
    assert main(["export", str(out), "--adapter", "nobody", "--to", str(tmp_path / "new")]) == 1


def test_an_export_can_be_compressed_again(published: tuple[Path, Outcome], base_path: Path, tmp_path: Path) -> None:
    out, _ = published
    for adapter_id in ("roman", "city-country"):
        main(["export", str(out), "--adapter", adapter_id, "--to", str(tmp_path / "adapters" / adapter_id)])
    outcome = run_job(tmp_path / "adapters", base_path, tmp_path / "out", rank=32)
    assert set(outcome.manifest.adapters) == {"roman", "city-country"}
    assert outcome.summary is not None
    assert outcome.summary.served is not None
    assert outcome.summary.served.worst < 1e-4


def test_show_prints_every_adapter_and_one_in_full(
    published: tuple[Path, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    out, outcome = published
    assert main(["show", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(adapter_id in printed for adapter_id in outcome.manifest.adapters)
    assert main(["show", str(out), "--adapter", "roman"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] == outcome.manifest.adapters["roman"].error
    assert main(["show", str(out), "--adapter", "nobody"]) == 1
    assert "'nobody'" in capsys.readouterr().err


def test_more_clusters_than_adapters_are_as_many_as_adapters(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:2])
    outcome = run_job(adapters, base_path, tmp_path / "out", clusters=5, rank=8)
    assert sorted(a.cluster or "" for a in outcome.manifest.adapters.values()) == ["0", "1"]


def test_nothing_acceptable_publishes_nothing(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", ("past",))
    rewrite(adapters / "past", bias="all")
    with pytest.raises(ConfigError, match="none of the 1 adapters"):
        run_job(adapters, base_path, tmp_path / "out")
    assert not (tmp_path / "out" / "CURRENT").exists()


def test_a_cluster_that_the_gate_empties_is_gone_from_manifest_and_page(
    base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters")
    every = run_job(adapters, base_path, tmp_path / "all", clusters=3, rank=4, gate=1.0).manifest
    least = {c: min(a.error for a in every.adapters.values() if a.cluster == c) for c in every.clusters}
    emptied = max(least, key=lambda cluster: least[cluster])
    out = tmp_path / "out"
    outcome = run_job(adapters, base_path, out, clusters=3, rank=4, gate=0.999 * least[emptied])
    assert set(outcome.manifest.clusters) == set(every.clusters) - {emptied}
    assert outcome.summary is not None
    assert np.shape(outcome.summary.similarity) == (2, 2)
    page = next(out.rglob("report.html")).read_text()
    assert "Similarity within and across clusters" in page
    assert "Left out" not in page


def test_work_is_cleaned_up(published: tuple[Path, Outcome]) -> None:
    assert [path for path in (published[0] / "work").rglob("*") if path.is_file() and ".cts" not in path.name] == []


class Stopped(BaseException):
    """What no part of the job catches, as if it had been killed there."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: str, *arguments: Path, **options: Any) -> None:
    """Run the job up to that step of the driver's."""

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(run, step, stop)
        with pytest.raises(Stopped):
            run_job(*arguments, **options)


def parts_of(out: Path) -> dict[str, int]:
    """Key of every file in work/ -> its modification time."""
    work = out / "work"
    files = [path for path in work.rglob("*") if path.is_file() and not path.name.startswith(".cts")]
    return {path.relative_to(work).as_posix(): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def undisturbed(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """What RESUMED gives of three adapters when nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    adapters = copy_adapters(zoo_path, root / "adapters", FEW[:3])
    return root, run_job(adapters, base_path, root / "out", **RESUMED)


def test_a_stopped_job_goes_on_and_does_nothing_twice(
    undisturbed: tuple[Path, Outcome], base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, out = undisturbed[0] / "adapters", tmp_path / "out"
    parts: dict[str, int] = {}
    for step in ("cluster_all", "fit_all", "assemble_all", "publish", "_clean_up"):
        stop_at(monkeypatch, step, adapters, base_path, out, **RESUMED)
        left = parts_of(out)
        assert len(left) > len(parts) or step == "_clean_up"
        assert parts.items() <= left.items()  # the very files: none was written again
        assert (out / "CURRENT").exists() == (step == "_clean_up")
        parts = left
    # Killed after CURRENT had moved: published, and not yet tidied up.
    gone_on = run_job(adapters, base_path, out, **RESUMED)
    assert gone_on.summary is None
    assert gone_on.manifest == undisturbed[1].manifest
    assert object_bytes(out) == object_bytes(undisturbed[0] / "out")
    assert parts_of(out) == {}


@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in (1, 2, 3))])
def test_damaged_parts_are_done_again(
    undisturbed: tuple[Path, Outcome], base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turn: int
) -> None:
    """Each file that a stopped job left is cut short, emptied, removed, or has a bit flipped."""
    adapters, out = undisturbed[0] / "adapters", tmp_path / "out"
    stop_at(monkeypatch, "publish", adapters, base_path, out, **RESUMED)
    paths = [*sorted((out / "work").rglob("*.*")), *sorted((out / "objects").glob("*.safetensors"))]
    paths = [path for path in paths if path.is_file() and not path.name.startswith(".cts")]
    assert {path.parent.name for path in paths} >= {"inspected", "samples", "assembled", "jd-full-2-8", "objects"}
    for index, path in enumerate(paths):
        data = path.read_bytes()
        path.unlink()
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        damaged = (data[:half], b"", None, flipped)[(index + turn) % 4]
        if damaged is not None:
            path.write_bytes(damaged)
    gone_on = run_job(adapters, base_path, out, **RESUMED)
    assert gone_on.manifest == undisturbed[1].manifest
    assert object_bytes(out) == object_bytes(undisturbed[0] / "out")
    assert parts_of(out) == {}


@pytest.mark.by_hand
@pytest.mark.slow
@pytest.mark.parametrize("which", ["objects/*.safetensors", "work/*/fits/*/3-0.safetensors"])
def test_intact_parts_whose_tensors_are_damaged_are_done_again(
    undisturbed: tuple[Path, Outcome], base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    adapters, out = undisturbed[0] / "adapters", tmp_path / "out"
    stop_at(monkeypatch, "publish", adapters, base_path, out, **RESUMED)
    for path in out.glob(which):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    gone_on = run_job(adapters, base_path, out, **RESUMED)
    assert gone_on.manifest == undisturbed[1].manifest
    assert object_bytes(out) == object_bytes(undisturbed[0] / "out")


def hear_interrupts() -> None:
    """What a shell starts in the background has interrupts ignored, and so have the workers that it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def fail_beside(folder: Path) -> None:
    """As soon as the other task has begun."""
    while not (folder / "began").exists():
        time.sleep(0.01)
    raise ConfigError("this one is wrong")


def test_when_a_task_fails_the_others_have_ended_before_the_job_hears_of_it(tmp_path: Path) -> None:
    """Or they would leave parts behind its tidying up."""

    def step(folder: Path, fails: bool) -> None:
        if fails:
            fail_beside(folder)
        hear_interrupts()
        try:
            (folder / "began").touch()  # within, for from now on it may be stopped
            for _ in range(6000):
                time.sleep(0.01)
            (folder / "part").touch()
        finally:
            (folder / "ended").touch()

    calls = [(tmp_path, False), (tmp_path, True)]
    with pytest.raises(ConfigError, match="this one is wrong"):
        list(tasks.run_bounded(ray.remote(num_cpus=1)(step), calls, 2))
    assert (tmp_path / "ended").exists()
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_task_that_misses_an_interrupt_is_stopped_all_the_same(
    tmp_path: Path, deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python swallows one that is raised in a callback; ``deaf``: all of them."""
    monkeypatch.setattr(tasks, "_STOP_PERIOD_S", 0.5)

    def step(folder: Path, fails: bool) -> None:
        if fails:
            fail_beside(folder)
        hear_interrupts()
        missed = 0
        for _ in range(6000):
            try:
                (folder / "began").touch()
                time.sleep(0.01)
            except KeyboardInterrupt:
                missed += 1
                if missed > 1 and not deaf:
                    (folder / "ended").touch()
                    raise
        (folder / "part").touch()

    calls = [(tmp_path, False), (tmp_path, True)]
    with pytest.raises(ConfigError, match="this one is wrong"):
        list(tasks.run_bounded(ray.remote(num_cpus=1)(step), calls, 2))
    assert {path.name for path in tmp_path.iterdir()} == ({"began"} if deaf else {"began", "ended"})


def test_another_name_of_the_base_is_accepted_when_told(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:2])
    rewrite(adapters / "number-en", base_model_name_or_path="models/smollm2-copy")
    refused = run_job(adapters, base_path, tmp_path / "out", rank=8, max_refused="1").manifest.refused
    assert "--accept-base 'models/smollm2-copy'" in refused["number-en"].message
    accepted = run_job(adapters, base_path, tmp_path / "out", rank=8, accept_base=("models/smollm2-copy",))
    assert not accepted.manifest.refused


def test_a_raw_pattern_that_matches_nothing_is_an_error(base_path: Path, zoo_path: Path, tmp_path: Path) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:2])
    with pytest.raises(ConfigError, match="--raw typo"):
        run_job(adapters, base_path, tmp_path / "out", raw=("typo*",))


def test_diagonal_cores_are_published_with_the_errors_a_dense_reconstruction_gives(
    base_path: Path, zoo_path: Path, tmp_path: Path
) -> None:
    adapters = copy_adapters(zoo_path, tmp_path / "adapters", FEW[:4])
    run_job(adapters, base_path, tmp_path / "out", method="jd-diag", clusters=2, rank=8, gate=1.0)
    manifest = current_manifest(tmp_path / "out")
    for adapter_id, adapter in manifest["adapters"].items():
        dense = dense_error(adapters / adapter_id, dense_served(tmp_path / "out", manifest, adapter_id))
        assert adapter["error"] == pytest.approx(dense, abs=1e-5)
    cores = load_file(tmp_path / "out" / "objects" / f"{manifest['clusters']['0']['cores'][7:]}.safetensors")
    assert {core.dim() for core in cores.values()} == {2}
