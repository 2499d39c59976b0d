"""gc deletes garbage and nothing else: not what is young, not what is unknown, not what a job in flight will need."""

from __future__ import annotations

import argparse
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.bundle import publish as publishing
from cluster.bundle.reading import Bundle
from cluster.bundle.removed import forget_removed, read_removed
from cluster.bundle.revisions import manifest_key, object_key
from cluster.errors import BundleError, CtsError, PublishConflict, StoreMissing
from cluster.store.address import open_store
from cluster.store.local import LocalStore
from cluster.store.protocol import Entry
from compress_jobs.__main__ import main
from compress_jobs.commands.gc import duration_s
from compress_jobs.job import run
from compress_jobs.lifecycle import revision
from compress_jobs.lifecycle.add import add_adapters
from compress_jobs.lifecycle.gc import collect
from compress_jobs.lifecycle.remove import remove_adapters
from compress_jobs.lifecycle.rollback import roll_back
from compress_jobs.lifecycle.source import Source
from tests.support.bundles import write_bundle
from tests.support.jobs import copy_adapters, run_job
from tests.support.processes import assert_all_visible_revisions_are_whole

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


def make_older(out: Path, by_s: float) -> None:
    """As if all of it had been written so much earlier."""
    for path in out.rglob("*"):
        if path.is_file():
            written = path.stat().st_mtime - by_s
            os.utime(path, (written, written))


def files(out: Path) -> set[str]:
    return {entry.key for entry in open_store(str(out)).list()}


@pytest.fixture(scope="module")
def written(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(out, collection, base): a lossless cluster of two, and one beside it; never to be changed."""
    root = tmp_path_factory.mktemp("written")
    adapters = copy_adapters(zoo_path, root / "adapters", ("past", "roman", "country-fr"))
    write_bundle(
        root / "out", base_path, {"0": {n: adapters / n for n in ("past", "roman")}}, {"raw": adapters / "past"}
    )
    return root / "out", adapters, base_path


@pytest.fixture
def out(written: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(written[0], tmp_path / "out")


def add(out: Path, written: tuple[Path, Path, Path]) -> list[str]:
    """country-fr, which stands alone there: one new object, and one more revision."""
    return add_adapters(Source(str(out), str(written[1]), str(written[2]), ("country-fr",)))


def test_what_no_kept_revision_needs_goes_and_all_else_stays(out: Path, written: tuple[Path, Path, Path]) -> None:
    store = open_store(str(out))
    other = "b-" + "0" * 16
    theirs = {manifest_key(other, 0): b"{}", f"bundles/{other}/revisions/0/report.json": b"{}"}
    parts = {"work/0123/fits/1-2.safetensors": b"part"}
    lost = {"objects/" + "a" * 64 + ".safetensors": b"of a failed job"}
    unknown = {
        "notes.txt": b"", "objects/README": b"", "objects/" + "b" * 64 + ".safetensors.bak": b"",
        "bundles/README": b"", f"bundles/{other}/revisions/0/mine.json": b"", "adapters/x/adapter_config.json": b"",
    }  # fmt: skip
    for key, data in (theirs | parts | lost | unknown).items():
        store.write(key, data)
    first = Bundle.open(str(out)).manifest
    add(out, written)
    second = Bundle.open(str(out)).manifest
    remove_adapters(str(out), ["roman", "country-fr"])
    third = Bundle.open(str(out)).manifest
    make_older(out, 2 * DAY_S)
    before = files(out)

    planned = collect(store, DAY_S, keep=2, dry_run=True)
    assert files(out) == before
    result = collect(store, DAY_S, keep=2)
    assert (result.deleted, result.num_bytes) == (planned.deleted, planned.num_bytes)
    stale = set(first.objects) - set(second.objects) - set(third.objects)
    gone = {*theirs, *parts, *lost, manifest_key(first.bundle, 0), *map(object_key, stale)}
    assert before - files(out) == gone
    assert result.unknown == len(unknown)
    assert result.kept_revisions == 2
    assert_all_visible_revisions_are_whole(store)
    assert Bundle.open(str(out)).manifest == third
    roll_back(str(out), None)
    assert Bundle.open(str(out)).manifest == second
    # Kept though it is not of the newest: it is current.
    make_older(out, 2 * DAY_S)
    collect(store, DAY_S, keep=1)
    assert Bundle.open(str(out)).manifest == second
    assert_all_visible_revisions_are_whole(store)


def test_nothing_younger_than_its_grace_age_is_deleted(out: Path, written: tuple[Path, Path, Path]) -> None:
    store = open_store(str(out))
    add(out, written)
    remove_adapters(str(out), ["country-fr"])
    store.write("work/0123/part", b"part")
    store.write("objects/" + "a" * 64 + ".safetensors", b"x")
    make_older(out, 23 * HOUR_S)
    before = files(out)
    assert not collect(store, DAY_S, keep=1).deleted
    assert files(out) == before
    assert collect(store, 22 * HOUR_S, keep=1).deleted["revisions"] == 2


def test_another_bundle_stays_until_the_current_one_is_as_old_as_the_grace_age(
    out: Path, written: tuple[Path, Path, Path]
) -> None:
    """An application may still serve it: a new bundle is a new deploy."""
    store = open_store(str(out))
    old = Bundle.open(str(out)).manifest
    make_older(out, 30 * DAY_S)
    new = write_bundle(out, written[2], {"0": {"roman": written[1] / "roman"}}, {})
    assert new.bundle != old.bundle
    assert not collect(store, DAY_S, keep=1).deleted
    assert Bundle.open(f"{out}/bundles/{old.bundle}").manifest == old
    make_older(out, DAY_S)
    assert collect(store, DAY_S, keep=1).deleted["revisions"] == 1
    with pytest.raises(StoreMissing):
        Bundle.open(f"{out}/bundles/{old.bundle}")
    assert_all_visible_revisions_are_whole(store)


def test_a_job_that_goes_on_keeps_its_old_parts_and_the_objects_they_name(out: Path) -> None:
    """It takes them up without writing them again."""
    store, sha = open_store(str(out)), "a" * 64
    old = {"work/0123/assembled.json": b'{"basis": {"sha": "sha256:%s"}}' % sha.encode(), "work/0123/fits/0": b""}
    gone = {"work/4567/part.json": b"{}", "objects/" + "b" * 64 + ".safetensors": b"y"}
    for key, data in {**old, **gone, f"objects/{sha}.safetensors": b"x"}.items():
        store.write(key, data)
    make_older(out, 2 * DAY_S)
    os.utime(out / "CURRENT")  # moved by another job since
    before = files(out)
    store.write("work/0123/new", b"")
    collect(store, DAY_S, keep=1)
    assert before - files(out) == set(gone)
    make_older(out, 2 * DAY_S)
    os.utime(out / "CURRENT")
    collect(store, DAY_S, keep=1)
    assert not {key for key in files(out) if key.startswith("work/") or sha in key}


def test_the_age_is_told_by_the_stores_clock(out: Path, written: tuple[Path, Path, Path]) -> None:
    """A store that is two days behind: what is 23 hours old there is old here, and stays."""

    class Behind(LocalStore):
        def clock_s(self) -> float:
            return super().clock_s() - 2 * DAY_S

    add(out, written)
    remove_adapters(str(out), ["country-fr"])
    make_older(out, 2 * DAY_S + 23 * HOUR_S)
    assert not collect(Behind(str(out)), DAY_S, keep=1).deleted
    assert collect(LocalStore(str(out)), DAY_S, keep=1).deleted


def test_without_a_current_or_with_a_kept_manifest_that_cannot_be_read_no_object_goes(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Bundle.open(str(out)).manifest
    (out / "objects" / ("a" * 64 + ".safetensors")).write_bytes(b"x")
    make_older(out, 2 * DAY_S)
    (out / "CURRENT").rename(out / "saved")
    assert main(["gc", str(out)]) == 1
    assert "nothing tells garbage" in capsys.readouterr().err
    (out / "saved").rename(out / "CURRENT")
    path = out / manifest_key(manifest.bundle, 0)
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    before = files(out)
    with pytest.raises(BundleError, match="format 99"):
        collect(open_store(str(out)), 0, keep=1)
    assert files(out) == before


def test_ages_are_a_number_and_a_unit() -> None:
    assert [duration_s(text) for text in ("24h", "30m", "0s", "7d")] == [86400, 1800, 0, 604800]
    for text in ("", "24", "h", "1.5h", "-1h", "24 h", "1w"):
        with pytest.raises(argparse.ArgumentTypeError, match="such as 24h"):
            duration_s(text)


# --- Beside jobs in flight ----------------------------------------------------------------------------------


class Watched(LocalStore):
    """A folder that calls ``before(operation, key)`` ahead of each write and look."""

    before: Callable[[str, str], None]

    def write(self, key: str, data: bytes) -> str:
        self.before("write", key)
        return super().write(key, data)

    def create(self, key: str, data: bytes) -> str:
        self.before("create", key)
        return super().create(key, data)

    def replace(self, key: str, data: bytes, *, if_match: str) -> str:
        self.before("replace", key)
        return super().replace(key, data, if_match=if_match)

    def head(self, key: str) -> Entry:
        self.before("head", key)
        return super().head(key)


def gc_at(point: int, out: Path, grace_s: float) -> tuple[Watched, list[int]]:
    """A store that runs a whole gc ahead of its ``point``-th operation; and a count of those that went by."""
    store, count = Watched(str(out)), [0]

    def before(operation: str, key: str) -> None:
        count[0] += 1
        if count[0] == point:
            collect(LocalStore(str(out)), grace_s, keep=1)

    store.before = before  # type: ignore[method-assign]
    return store, count


@pytest.fixture(scope="module")
def aged(written: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Days old, with the object that an ``add`` of country-fr makes lying about, needed by nothing."""
    out = shutil.copytree(written[0], tmp_path_factory.mktemp("aged") / "out")
    add(out, written)
    orphaned = Bundle.open(str(out)).manifest
    remove_adapters(str(out), ["country-fr"])
    forget_removed(open_store(str(out)), read_removed(open_store(str(out))))
    (out / manifest_key(orphaned.bundle, orphaned.revision)).unlink()
    make_older(out, 5 * DAY_S)
    return out


@pytest.mark.parametrize("grace_s", [0.0, DAY_S])
def test_a_gc_at_any_point_of_an_add_loses_nothing(
    aged: Path, written: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    """Whole, at every write and look of the add, which takes up an old object that nothing needs."""
    point, num_points = 0, 1
    while point < num_points:
        point += 1
        out = shutil.copytree(aged, tmp_path / f"out-{point}")
        store, count = gc_at(point, out, grace_s)
        monkeypatch.setattr(revision, "open_store", lambda _, store=store: store)
        add(out, written)
        monkeypatch.undo()
        num_points = count[0]
        assert "country-fr" in Bundle.open(str(out)).manifest.adapters
        assert_all_visible_revisions_are_whole(open_store(str(out)))
    assert num_points >= 10  # its object, the check, the manifest, the report, the check, CURRENT


def test_an_object_that_is_deleted_all_the_same_ends_the_add_and_current_stays(
    aged: Path, written: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by somebody's own clean-up, ahead of each operation up to the last look at it: a clear failure, or it is
    there again. (After that look nothing can be seen any more: that is what the grace age is for.)"""
    begun = Bundle.open(str(aged)).manifest
    operations: list[tuple[str, str]] = []
    ends, point = set(), 0
    while point <= len(operations):
        out = shutil.copytree(aged, tmp_path / f"out-{point}")
        before_add = files(out)
        (new,) = (
            key for key in before_add if key.startswith("objects/") and "sha256:" + key[8:72] not in begun.objects
        )
        seen: list[tuple[str, str]] = []

        def note(operation: str, key: str, seen: list[Any] = seen, lost: Path = out / new, at: int = point) -> None:
            seen.append((operation, key))
            if len(seen) == at:
                lost.unlink()

        store = Watched(str(out))
        store.before = note  # type: ignore[method-assign]
        monkeypatch.setattr(revision, "open_store", lambda _, store=store: store)
        try:
            add(out, written)
            ends.add("added")
        except BundleError as error:
            ends.add("refused")
            assert f"are missing, such as sha256:{new[8:72]}; CURRENT was not moved" in str(error)
            assert Bundle.open(str(out)).manifest == begun
            assert files(out) <= before_add
        monkeypatch.undo()
        assert_all_visible_revisions_are_whole(open_store(str(out)))
        if point == 0:
            operations = seen[: max(i for i, done in enumerate(seen) if done == ("head", new)) + 1]
        point += 1
    assert ends == {"added", "refused"}


@pytest.mark.parametrize("grace_s", [0.0, DAY_S])
def test_a_gc_at_any_point_of_a_rollback_loses_nothing(
    written: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    """To a revision that gc with --keep 1 would delete: either it is current and whole, or it was gone before."""
    start = shutil.copytree(written[0], tmp_path / "start")
    add(start, written)
    remove_adapters(str(start), ["roman"])
    make_older(start, 5 * DAY_S)
    ends = []
    for point in range(1, 9):
        out = shutil.copytree(start, tmp_path / f"out-{point}")
        store, count = gc_at(point, out, grace_s)
        monkeypatch.setattr(revision, "open_store", lambda _, store=store: store)
        try:
            roll_back(str(out), None)
            ends.append("back")
        except CtsError as error:
            assert "no revision 1 of bundle" in str(error)
            ends.append("gone")
        monkeypatch.undo()
        assert ("roman" in Bundle.open(str(out)).manifest.adapters) == (ends[-1] == "back")
        assert_all_visible_revisions_are_whole(open_store(str(out)))
    assert ends[0] == "gone"
    assert set(ends[1:]) == {"back"}
    assert count[0] < 8  # and so after its last operation too


def test_gc_looks_again_right_before_it_deletes(aged: Path, tmp_path: Path) -> None:
    """A job takes the object up after gc has listed it; another moves CURRENT after gc has looked at it."""
    out = shutil.copytree(aged, tmp_path / "taken-up")
    garbage = [
        e.key for e in LocalStore(str(out)).list("objects/") if e.key[8:72] not in str(Bundle.open(str(out)).manifest)
    ]
    assert garbage
    store = Watched(str(out))

    def take_up(operation: str, key: str) -> None:
        if operation == "head" and key in garbage:
            path = out / key
            path.write_bytes(path.read_bytes())

    store.before = take_up  # type: ignore[method-assign]
    result = collect(store, DAY_S, keep=1)
    assert "objects" not in result.deleted
    assert all((out / key).exists() for key in garbage)

    out = shutil.copytree(aged, tmp_path / "moved")
    store, count = Watched(str(out)), [0]

    def move(operation: str, key: str) -> None:
        count[0] += (operation, key) == ("head", "CURRENT")
        if count[0] == 2:
            count[0] += 1
            roll_back_to = LocalStore(str(out))
            roll_back_to.write("CURRENT", roll_back_to.read("CURRENT").data)

    store.before = move  # type: ignore[method-assign]
    with pytest.raises(PublishConflict, match="gc stopped after 0 deletions"):
        collect(store, DAY_S, keep=1)
    assert all((out / key).exists() for key in garbage)


@pytest.mark.by_hand
@pytest.mark.slow
def test_a_gc_that_never_rests_loses_nothing_of_a_run(
    written: tuple[Path, Path, Path],
    out: Path,
    ray_for_jobs: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For real, over and over beside the run's own processes, without any grace; and once at each dangerous point:
    before anything is published, and between manifest and CURRENT. The run makes another bundle than CURRENT's."""
    seen: list[Any] = []
    over = threading.Event()

    def keep_collecting() -> None:
        while not over.is_set():
            seen.append(collect(LocalStore(str(out)), 0, keep=1))
            time.sleep(0.02)

    def gc_first(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            seen.append(collect(LocalStore(str(out)), 0, keep=1))
            return function(*arguments)

        return called

    monkeypatch.setattr(run, "publish", gc_first(run.publish))
    monkeypatch.setattr(publishing, "move_current", gc_first(publishing.move_current))
    old = Bundle.open(str(out)).manifest
    make_older(out, 5 * DAY_S)
    thread = threading.Thread(target=lambda: _until_moved(keep_collecting))
    thread.start()
    try:
        outcome = run_job(written[1], written[2], out, rank=4, allow_drop="all")
    finally:
        over.set()
        thread.join()
    assert outcome.summary is not None
    assert Bundle.open(str(out)).manifest == outcome.manifest
    assert outcome.manifest.bundle != old.bundle
    assert len(seen) > 10
    assert sum(result.too_young for result in seen) > 0  # parts and objects of the run were there to be deleted
    assert_all_visible_revisions_are_whole(open_store(str(out)))


def _until_moved(collecting: Callable[[], None]) -> None:
    try:
        collecting()
    except (PublishConflict, StoreMissing):
        """CURRENT moved: the run is over."""
