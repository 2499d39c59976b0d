"""A bundle in step with its collection: real adapters, the command as it is called."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.adapters.reading import read_adapter
from cluster.errors import PublishConflict
from compress_jobs.__main__ import main
from compress_jobs.lifecycle import newcomers
from compress_jobs.lifecycle import watch as watching
from compress_jobs.lifecycle.source import Source
from compress_jobs.lifecycle.watch import Watch
from tests.support.jobs import copy_adapters, current_manifest, rewrite, run_job, scale_factor_b
from tests.support.paths import REPOSITORY

FITTED = ("number-en", "first-letter", "country-fr")


@pytest.fixture(scope="module")
def published(
    base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory, ray_for_jobs: None
) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("watched")
    adapters = copy_adapters(zoo_path, root / "adapters", FITTED)
    run_job(adapters, base_path, root / "out", clusters=1, rank=8)
    return adapters, root / "out"


@pytest.fixture
def place(published: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy to change, with the times of its files: they are what a folder's ETags are made of."""
    adapters = shutil.copytree(published[0], tmp_path / "adapters")
    return adapters, shutil.copytree(published[1], tmp_path / "out")


@pytest.fixture
def watch(place: tuple[Path, Path], base_path: Path) -> Watch:
    made = Watch(Source(str(place[1]), str(place[0]), str(base_path)))
    made.look()  # the copy's files have other ETags: read once, and found to be what is served
    return made


def served(place: tuple[Path, Path]) -> dict[str, str]:
    manifest: dict[str, Any] = current_manifest(place[1])
    return {name: own["served"] for name, own in manifest["adapters"].items()}


def test_what_came_changed_and_went_is_one_revision_and_nothing_else_is_read(
    watch: Watch, place: tuple[Path, Path], zoo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counting(store: Any, files: Any, base: Any) -> Any:
        read.append(files.adapter_id)
        return read_adapter(store, files, base)

    monkeypatch.setattr(newcomers, "read_adapter", counting)
    before = served(place)
    idle = watch.look()
    assert idle.line().endswith(" revision 0: 3 served; 0 added, 0 updated, 0 removed, 0 refused")
    assert not read
    shutil.copytree(zoo_path / "roman", place[0] / "roman")
    scale_factor_b(place[0] / "number-en", 1.5)
    shutil.rmtree(place[0] / "country-fr")
    done = watch.look()
    assert (done.added, done.updated, done.removed, done.manifest.revision) == (1, 1, 1, 1)
    assert sorted(read) == ["number-en", "roman"]
    after = served(place)
    assert after.keys() == {"number-en", "first-letter", "roman"}
    assert after["first-letter"] == before["first-letter"]
    assert after["number-en"] != before["number-en"]
    assert watch.look().manifest.revision == 1
    # Its folder is back: nobody removed it on purpose.
    shutil.copytree(zoo_path / "country-fr", place[0] / "country-fr")
    assert watch.look().added == 1
    assert "country-fr" in served(place)


def test_an_adapter_that_is_refused_is_named_once_and_read_again_when_its_files_change(
    watch: Watch, place: tuple[Path, Path], zoo_path: Path
) -> None:
    shutil.copytree(zoo_path / "roman", place[0] / "roman")
    rewrite(place[0] / "roman", use_dora=True)
    rewrite(place[0] / "number-en", use_dora=True)
    before = served(place)
    done = watch.look()
    assert done.refused == 2
    assert any("roman" in line and "dora" in line for line in done.lines)
    assert served(place) == before, "one that is served stays as it was"
    assert (watch.look().refused, watch.look().lines) == (0, [])
    rewrite(place[0] / "roman", use_dora=False)
    assert watch.look().added == 1


def test_folders_that_are_all_gone_are_a_mistake_and_remove_nothing(
    watch: Watch, place: tuple[Path, Path], base_path: Path
) -> None:
    for name in FITTED[:2]:
        shutil.rmtree(place[0] / name)
    done = watch.look()
    assert (done.removed, done.held_back, len(served(place))) == (0, 2, 3)
    assert "2 of 3 served adapters have no folder any more" in done.lines[0]
    assert "2 gone and held back" in done.line()
    allowing = Watch(Source(str(place[1]), str(place[0]), str(base_path)), allow_drop="2")
    assert allowing.look().removed == 2
    assert served(place).keys() == {FITTED[2]}


def test_an_adapter_that_an_alias_sends_requests_to_stays_though_its_folder_has_gone(
    watch: Watch, place: tuple[Path, Path]
) -> None:
    assert main(["alias", str(place[1]), "support", "--to", "country-fr"]) == 0
    shutil.rmtree(place[0] / "country-fr")
    done = watch.look()
    assert (done.removed, done.held_back, len(served(place))) == (0, 1, 3)
    assert any("country-fr: its folder has gone, but the alias support" in line for line in done.lines)
    assert main(["alias", str(place[1]), "support", "--to", "number-en"]) == 0
    assert watch.look().removed == 1
    assert served(place).keys() == {"number-en", "first-letter"}


def test_what_was_removed_or_rolled_back_by_hand_stays_so(
    watch: Watch, place: tuple[Path, Path], zoo_path: Path
) -> None:
    shutil.copytree(zoo_path / "roman", place[0] / "roman")
    assert watch.look().added == 1
    assert main(["rollback", str(place[1]), "--allow-drop", "1"]) == 0
    assert main(["remove", str(place[1]), "--adapter", "first-letter"]) == 0
    done = watch.look()
    assert (done.added, done.removed, served(place).keys()) == (0, 0, {"number-en", "country-fr"})


def test_another_writer_wins_and_the_next_round_goes_on_from_there(
    watch: Watch, place: tuple[Path, Path], zoo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(zoo_path / "roman", place[0] / "roman")
    publish_next = watching.publish_next

    def overtaken(*args: Any) -> list[str]:
        assert main(["remove", str(place[1]), "--adapter", "first-letter"]) == 0
        return publish_next(*args)

    with monkeypatch.context() as patch:
        patch.setattr(watching, "publish_next", overtaken)
        with pytest.raises(PublishConflict):
            watch.look()
    assert served(place).keys() == {"number-en", "country-fr"}
    assert watch.look().added == 1
    assert served(place).keys() == {"number-en", "country-fr", "roman"}


def test_once_ends_with_the_exit_code_of_what_failed(place: tuple[Path, Path], base_path: Path, capsys) -> None:
    line = ["watch", str(place[1]), "--adapters", str(place[0]), "--base", str(base_path), "--once"]
    assert main(line) == 0
    assert "3 served; 0 added" in capsys.readouterr().out
    assert main([*line[:3], str(place[0] / "nowhere"), *line[4:]]) == 2
    assert "nowhere" in capsys.readouterr().err
    shutil.rmtree(place[1])
    assert main(line) == 1
    assert "no CURRENT there" in capsys.readouterr().err


def test_it_goes_on_when_the_collection_cannot_be_read_for_a_while(
    place: tuple[Path, Path], base_path: Path, zoo_path: Path
) -> None:
    adapters, out = place
    command = [sys.executable, "-m", "compress_jobs", "watch", str(out), "--adapters", str(adapters)]
    log = (out.parent / "log").open("w")

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert process.poll() is None
            assert time.monotonic() < end, (out.parent / "log").read_text()
            time.sleep(0.1)

    process = subprocess.Popen(
        [*command, "--base", str(base_path), "--every", "1s"], stdout=log, stderr=log, cwd=REPOSITORY
    )
    try:
        until(lambda: "3 served" in (out.parent / "log").read_text())
        adapters.rename(adapters.with_name("elsewhere"))
        until(lambda: "nothing was changed: --adapters" in (out.parent / "log").read_text())
        adapters.with_name("elsewhere").rename(adapters)
        shutil.copytree(zoo_path / "roman", adapters / "roman")
        until(lambda: "roman" in served(place))
    finally:
        process.terminate()
        process.wait(30)
