"""``alias`` as it is typed: what it writes, what it says, what it refuses; and what other commands owe to an alias."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.bundle.aliases import KEY, read_aliases
from cluster.store.address import open_store
from compress_jobs.__main__ import main
from tests.support.bundles import write_bundle

Call = Callable[..., str]


@pytest.fixture(scope="module")
def written(base_path: Path, zoo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never to be changed."""
    out = tmp_path_factory.mktemp("aliased") / "out"
    write_bundle(out, base_path, {"0": dict.fromkeys(("v7", "v8"), zoo_path / "past")}, {"t/v9": zoo_path / "past"})
    return out


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "out")


@pytest.fixture
def call(out: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command on ``out``; returns what it printed, after checking its exit status."""

    def run(command: str, *more: str, status: int = 0) -> str:
        assert main([command, str(out), *more]) == status
        printed = capsys.readouterr()
        assert (printed.err == "") == (status == 0)
        return printed.out + printed.err

    return run


def aliases(out: Path) -> object:
    return read_aliases(open_store(str(out)))[0]


def test_an_alias_is_made_split_moved_back_and_removed_each_by_one_write_that_says_what_was(
    out: Path, call: Call
) -> None:
    current = (out / "CURRENT").read_bytes()
    assert call("alias") == f"no alias at {out}\n"
    assert "before     there was no support\nnow        support: v7 100%\n" in call("alias", "support", "--to", "v7")
    canary = call("alias", "support", "--to", "v7=90", "v8=10")
    assert "before     support: v7 100%\nnow        support: v7 90%, v8 10%\n" in canary
    assert json.loads((out / KEY).read_bytes()) == {"format": 1, "aliases": {"support": {"v7": 90, "v8": 10}}}
    assert call("alias", "support", "--to", "v7=90", "v8=10") == "unchanged  support: v7 90%, v8 10%\n"
    call("alias", "other/name", "--to", "t/v9=1", "--to", "v8=2", "v7=0")
    assert call("alias") == "other/name: t/v9 33.3%, v7 0%, v8 66.7%\nsupport: v7 90%, v8 10%\n"
    assert call("alias", "support") == "support: v7 90%, v8 10%\n"
    assert "now        support: v7 100%\naliases    2 at" in call("alias", "support", "--to", "v7")
    assert "now        requests for it get a 404" in call("alias", "other/name", "--remove")
    assert aliases(out) == {"support": {"v7": 100}}
    assert (out / "CURRENT").read_bytes() == current


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "an adapter's id": (("v7", "--to", "v8"), "NAME v7: it is the id of an adapter"),
    "the base's name": (("HuggingFaceTB/SmolLM2-135M-Instruct", "--to", "v7"), "it is the base's name"),
    "no plain name": (("a/b/c", "--to", "v7"), "NAME a/b/c: expected one or two plain segments"),
    "no such adapter": (("new", "--to", "v7=1", "v9=1"), "--to v9: not in the current revision of"),
    "the base as a target": (("new", "--to", "HuggingFaceTB/SmolLM2-135M-Instruct"), "not in the current revision"),
    "an alias of an alias": (("new", "--to", "support"), "--to support: it is an alias itself"),
    "an alias of itself": (("support", "--to", "support"), "--to support: it is an alias itself"),
    "nobody gets anything": (("new", "--to", "v7=0", "v8=0"), "no target has a weight above 0"),
    "too much": (("new", "--to", "v7=1000001"), "expected a whole number from 0 to 1000000"),
    "a weight is missing": (("new", "--to", "v7=90", "v8"), "--to v8: its weight is missing; .* v8=50"),
    "twice": (("new", "--to", "v7=90", "v7=10"), "--to v7: it is there twice"),
    "no such alias": (("new",), "NAME new: no alias of"),
    "no such alias to remove": (("new", "--remove"), "NAME new: no alias of .*lists those that are"),
    "no name": (("--to", "v7"), "--to: the alias that is meant is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name_and_changes_nothing(case: str, out: Path, call: Call) -> None:
    call("alias", "support", "--to", "v7")
    line, expected = REFUSED[case]
    told = call("alias", *line, status=2)
    assert len(told.splitlines()) == 1
    assert re.search(expected, told), told
    assert aliases(out) == {"support": {"v7": 100}}


@pytest.mark.parametrize("weight", ["v7=", "v7=-1", "v7=0.9", "v7=90%"])
def test_a_weight_that_is_no_whole_number_is_refused(
    out: Path, weight: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["alias", str(out), "support", "--to", weight])
    assert f"{weight!r}: expected an adapter's id, = and a whole number" in capsys.readouterr().err


def test_a_file_that_is_none_is_named_and_left_as_it_is(out: Path, call: Call) -> None:
    (out / KEY).write_text("{}")
    for more in ((), ("support", "--to", "v7"), ("support", "--remove")):
        assert f"{out}/{KEY}: key 'aliases' is missing" in call("alias", *more, status=1)
    assert (out / KEY).read_text() == "{}"
    # Neither that nor anything else keeps CURRENT where it is.
    call("remove", "--adapter", "t/v9", status=1)
    (out / KEY).unlink()
    call("remove", "--adapter", "t/v9")
    (out / KEY).write_text("{}")
    assert "warning    whether aliases do what they say cannot be told" in call("rollback")


def test_an_adapter_that_an_alias_sends_requests_to_is_not_removed_before_the_alias_is_moved(
    out: Path, call: Call
) -> None:
    call("alias", "support", "--to", "v7=90", "v8=10")
    current = (out / "CURRENT").read_bytes()
    told = call("remove", "--adapter", "v8", "t/v9", status=2)
    assert "--adapter v8 (alias support): requests for the alias would get a 404" in told
    assert (out / "CURRENT").read_bytes() == current
    call("alias", "support", "--to", "v7=100", "v8=0")
    call("remove", "--adapter", "v8", "t/v9")
    assert aliases(out) == {"support": {"v7": 100, "v8": 0}}


def test_rollback_and_gc_leave_aliases_alone_and_rollback_tells_what_they_lack(out: Path, call: Call) -> None:
    call("remove", "--adapter", "v8")
    call("rollback")
    call("alias", "support", "--to", "v7=90", "v8=10")
    before = (out / KEY).read_bytes()
    told = call("rollback", "--to", "1", "--allow-drop", "1")
    assert "warning    alias support: its target v8 is not served" in told
    assert "warning    alias support: its target v8 is not served" in call("alias")
    assert "unknown    0 files" in call("gc", "--grace", "0s", "--keep", "1")
    assert (out / KEY).read_bytes() == before
