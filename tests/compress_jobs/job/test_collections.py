"""Collections as people have them: what of a listing is taken for an adapter."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from cluster.bundle.reading import Bundle
from compress_jobs.job import ray_cluster
from tests.support.jobs import rewrite
from tests.support.place import Place

pytestmark = pytest.mark.usefixtures("ray_for_jobs")


def test_what_training_left_in_an_adapters_folder_is_no_adapter_unless_asked_for(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.upload("a6", to="a0/checkpoint-20")
    place.upload("a7", to="tenant/a7")
    place.upload("a8", to="tenant/a7/best")
    assert place.call("run") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "tenant/a7"}
    said = "left out 2 folders within adapters' folders, such as a0/checkpoint-20"
    assert said in capsys.readouterr().err
    for command in ("add", "update"):
        assert place.call(command) == 0
        assert said in capsys.readouterr().err
    assert place.call("compact", "--drift", "-1") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "tenant/a7"}

    assert place.call("add", "--checkpoints") == 0
    refused = "adapter tenant/a7/best"  # an id has two segments at most
    assert "a0/checkpoint-20" in place.served()
    assert refused not in place.served()


def test_a_checkpoint_that_is_served_stays_served_without_asking_again(place: Place) -> None:
    place.upload("a6", to="a0/checkpoint-20")
    assert place.call("run", "--checkpoints") == 0
    served = {"a0", "a1", "a2", "a3", "a4", "a5", "a0/checkpoint-20"}
    assert place.served() == served
    for command in (["update"], ["add"], ["compact", "--drift", "-1"], ["run"]):
        assert place.call(*command) == 0
        assert place.served() == served


def test_an_adapter_file_at_the_top_of_the_collection_hides_no_adapter(place: Place) -> None:
    (place.adapters / "adapter_config.json").write_text("{}")
    assert place.call("run", "--max-refused", "1") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5"}


@pytest.mark.parametrize("stray", ["adapters.npz", "adapter_model.bin"])
def test_a_stray_file_in_a_tenants_folder_hides_no_adapter_of_it(place: Place, stray: str) -> None:
    place.upload("a6", to="tenant/one")
    (place.adapters / "tenant" / stray).touch()
    assert place.call("run", "--max-refused", "1") == 0
    assert "tenant/one" in place.served()


def test_only_and_without_take_patterns(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.upload("a6", to="tenant/one")
    place.upload("a7", to="tenant/two")
    assert place.call("run", "--only", "tenant/*", "--only", "a1", "--without", "*/two") == 0
    assert place.served() == {"tenant/one", "a1"}
    for option in ("--only", "--without"):
        assert place.call("run", option, "nobody-*") == 2
        assert f"{option} nobody-*: no such adapter" in capsys.readouterr().err
    assert place.call("run", "--only", "a*", "--allow-missing") == 1
    assert "tenant/one (--only leaves it out)" in capsys.readouterr().err
    assert place.call("run", "--only", "a*", "--allow-drop", "1") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5"}


def test_compact_without_a_pattern_removes_all_that_match(place: Place) -> None:
    place.upload("a6", to="tenant/one")
    place.upload("a7", to="tenant/two")
    assert place.call("run") == 0
    assert place.call("compact", "--without", "tenant/*", "a5") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4"}
    assert json.loads((place.out / "REMOVED").read_text()).keys() == {"tenant/one", "tenant/two", "a5"}
    assert place.call("compact", "--without", "tenant/three*") == 2


def test_names_that_adapters_call_the_base_by_are_accepted_by_pattern_and_from_then_on(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        rewrite(place.adapters / f"a{number}", base_model_name_or_path=f"/scratch/job-{number}/base")
    rewrite(place.adapters / "a3", base_model_name_or_path=None)
    assert place.call("run") == 1
    assert "--accept-base '/scratch/job-0/base'" in capsys.readouterr().err
    assert place.call("run", "--accept-base", "/scratch/*", "--accept-unnamed-base") == 0
    assert len(place.served()) == 6
    for number, name in ((6, "/scratch/another/base"), (7, "")):
        rewrite(place.upload(f"a{number}"), base_model_name_or_path=name)
    assert place.call("add") == 0
    assert place.call("compact", "--without", "a0") == 0
    assert place.served() == {f"a{number}" for number in range(1, 8)}


def test_the_option_that_is_printed_accepts_all_that_it_was_printed_for(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5):
        rewrite(place.adapters / f"a{number}", base_model_name_or_path=f"unsloth/tiny-{number}-bnb-4bit")
    rewrite(place.adapters / "a5", base_model_name_or_path="")
    assert place.call("run") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("accept ")]
    assert place.call("run", *shlex.split(line.partition("base: ")[2])) == 0
    assert len(place.served()) == 6


def _deep(place: Place) -> None:
    """All six as an experiment tracker keeps its runs."""
    for number in range(6):
        shutil.rmtree(place.adapters / f"a{number}")
        place.upload(f"a{number}", to=f"{number % 2}/run{number}/artifacts/model")


def test_a_collection_several_folders_deep_is_named_with_the_line_that_works(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    _deep(place)
    place.upload("a6", to="0/run0/artifacts/model/checkpoint-20")
    assert place.call("run") == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "6 adapters lie deeper than name or tenant/name, such as 0/run0/artifacts/model" in line
    assert place.call("run", *shlex.split(line.partition("what names them: ")[2])) == 0
    served = {f"{number % 2}/run{number}" for number in range(6)}
    assert place.served() == served

    place.upload("a7", to="1/run7/artifacts/model")
    assert place.call("add") == 0
    place.upload("a8", to="1/run7/artifacts/model")
    assert place.call("update") == 0
    assert "updated    1/run7" in capsys.readouterr().out
    assert place.call("compact", "--without", "0/*") == 0
    assert place.served() == {"1/run1", "1/run3", "1/run5", "1/run7"}


def test_a_few_that_lie_deeper_are_refused_with_the_patterns_that_name_all(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.upload("a6", to="hub/models--org--one/snapshots/0f3c")
    place.upload("a7", to="hub/models--org--two/snapshots/12ab")
    place.upload("a8", to="tenant/a8")
    assert place.call("run", "--max-refused", "2") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "tenant/a8"}
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "lie deeper" in line]
    assert place.call("run", *shlex.split(line.partition("names them: ")[2])) == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "tenant/a8", "org/one", "org/two"}


def test_two_folders_of_one_id_are_refused_and_hurt_nobody_else(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    _deep(place)
    place.upload("a6", to="9/run0/artifacts/model")
    place.upload("a7", to="9/run9/other")
    assert place.call("run", "--id-pattern", "*/{name}/artifacts/model", "--max-refused", "1") == 0
    assert place.served() == {"run1", "run2", "run3", "run4", "run5"}
    said = capsys.readouterr()
    assert "left out 1 folders that no --id-pattern names, such as 9/run9/other" in said.err
    assert "run0 (id): 2 folders have this id: 0/run0/artifacts/model, 9/run0/artifacts/model" in said.out
    for pattern, expected in (("nothing/{name}", "names none of the 8 folders"), ("{id}", "expected a folder's path")):
        assert place.call("run", "--id-pattern", pattern) == 2
        assert expected in capsys.readouterr().err


def test_what_was_asked_about_checkpoints_holds_for_later_revisions(place: Place) -> None:
    assert place.call("run", "--checkpoints") == 0
    place.upload("a6", to="a0/checkpoint-20")
    assert place.call("add") == 0
    assert "a0/checkpoint-20" in place.served()
    place.upload("a7", to="a0/checkpoint-40")
    assert place.call("compact", "--drift", "-1") == 0
    assert "a0/checkpoint-20" in place.served()


def test_the_same_line_twice_finds_the_same_adapters(place: Place) -> None:
    place.upload("a6", to="a0/checkpoint-1")
    patterns = ["--id-pattern", "{name}", "--id-pattern", "{name}/*"]
    for _ in range(2):
        assert place.call("run", *patterns) == 0
    assert place.call("update") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5"}


def test_a_pattern_that_was_forgotten_is_no_folder_that_is_missing(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.upload("a6", to="x/y/b")
    assert place.call("run", "--id-pattern", "{name}", "--id-pattern", "x/y/{name}") == 0
    assert place.call("run", "--id-pattern", "{name}", "--allow-missing") == 1
    assert "b (its folder is not named by --id-pattern)" in capsys.readouterr().err
    shutil.rmtree(place.adapters / "x")
    assert place.call("run", "--id-pattern", "{name}", "--allow-missing") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5"}


@pytest.mark.parametrize("name", ["a[01]", "a*", "zz[1]", "a?"])
def test_compact_drops_nobody_for_a_folder_whose_name_looks_like_a_pattern(place: Place, name: str) -> None:
    assert place.call("run") == 0
    place.upload("a6", to=name)
    assert place.call("compact", "--without", "a5") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4"}


def test_a_layout_that_changes_is_told_to_add_and_kept(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.call("run") == 0
    for number in range(6):
        shutil.rmtree(place.adapters / f"a{number}")
        place.upload(f"a{number}", to=f"r/q/a{number}")
    assert place.call("run", "--id-pattern", "r/q/{name}") == 0
    assert "--id-pattern and --checkpoints are not recorded" in capsys.readouterr().err
    place.upload("a6", to="r/q/a6")
    assert place.call("add") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert place.call("add", *shlex.split(line.partition("what names them: ")[2])) == 0
    place.upload("a7", to="r/q/a6")
    assert place.call("update") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "a6"}


def test_all_that_a_pattern_names_may_lie_within_other_adapters(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.upload("a6", to="a0/checkpoint-1")
    assert place.call("run", "--id-pattern", "{name}/checkpoint-*") == 2
    assert "lie within other adapters' folders, such as a0/checkpoint-1: --checkpoints takes them" in (
        capsys.readouterr().err
    )


def test_what_was_brought_stays_when_another_copy_of_the_base_or_a_broken_file_would_take_it(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, full = place.base, tmp_path / "full"
    shutil.copytree(bare, full)
    (full / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    place.base = full
    own = place.adapters / "a0" / "chat_template.jinja"
    own.write_text("{{ messages[0].content }}")
    assert place.call("run") == 0
    before = place.current()
    place.base = bare
    assert place.call("update") == 0
    assert place.current() == before
    assert "whether adapters brought another chat template or tokens is not told" in capsys.readouterr().err
    own.write_bytes(b"\xff\xfe")
    place.base = full
    assert place.call("update") == 0
    assert "a0 (unreadable): chat_template.jinja: not understood" in capsys.readouterr().out
    assert place.current() == before
    own.write_text("{{ messages[0].role }}")
    assert place.call("update") == 0
    manifest = Bundle.open(str(place.out)).manifest
    assert list(manifest.templates.values()) == ["{{ messages[0].role }}"]


@pytest.fixture(scope="module")
def published(generated: Path, tmp_path_factory: pytest.TempPathFactory, ray_for_jobs: None) -> Path:
    """Where a `Place` of two adapters is published. Never to be changed."""
    root = tmp_path_factory.mktemp("published")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ray_cluster, "connect", lambda _: None)
        assert Place(generated, root, 2).call("run") == 0
    return root


@pytest.mark.parametrize("command", ["run", "add", "update", "compact"])
@pytest.mark.parametrize(
    ("adapters", "seen"),
    [
        ("nowhere", "No such file"),
        ("a-file", "Not a directory"),
        ("empty", "no adapter there"),
        ("adapters/a0", "it is an adapter's own folder; give the folder above it"),
        ("trained", "it is an adapter's own folder; give the folder above it"),
    ],
)
def test_what_is_no_collection_is_told_by_one_exit_code(
    published: Path,
    generated: Path,
    tmp_path: Path,
    command: str,
    adapters: str,
    seen: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a-file").touch()
    (tmp_path / "empty").mkdir()
    shutil.copytree(generated / "adapters" / "a0", tmp_path / "trained")
    shutil.copytree(generated / "adapters" / "a1", tmp_path / "trained" / "checkpoint-20")
    (tmp_path / "adapters").symlink_to(generated / "adapters")
    place = Place(generated, published, 0)
    before = place.current()
    place.adapters = tmp_path / adapters
    assert place.call(command, *(["--drift", "-1"] if command == "compact" else [])) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m compress_jobs: --adapters")
    assert str(tmp_path / adapters) in last
    assert seen in last
    assert place.current() == before
