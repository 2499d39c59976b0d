"""Nothing that is served is dropped by the way, and nothing that was removed comes back by itself."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.bundle.reading import Bundle
from cluster.bundle.removed import note_removed
from cluster.errors import StoreMissing
from cluster.store.address import open_store
from compress_jobs.job import finish, ray_cluster
from compress_jobs.job import prepare as preparing
from compress_jobs.job import run as job
from compress_jobs.job.options import RunOptions
from compress_jobs.lifecycle.remove import remove_adapters
from tests.support.jobs import rewrite
from tests.support.place import Place

pytestmark = pytest.mark.usefixtures("ray_for_jobs")

OTHER_NAME = "our/mirror"


def break_config(place: Place) -> None:
    rewrite(place.adapters / "a2", use_dora=True)


def break_weights(place: Place) -> None:
    (place.adapters / "a2" / "adapter_model.safetensors").write_bytes(b"version https://git-lfs")


def take_away(place: Place) -> None:
    shutil.rmtree(place.adapters / "a2")


@pytest.mark.parametrize("harm", [break_config, break_weights, take_away])
@pytest.mark.parametrize("command", ["run", "compact"])
def test_an_adapter_that_can_no_longer_be_accepted_stays_served(
    place: Place, harm: Callable[[Place], None], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.call("run") == 0
    before = place.current()
    harm(place)
    more = ["--drift", "-1"] if command == "compact" else []
    status = place.call(command, *more)
    said = capsys.readouterr().err
    assert status == 1
    assert "a2" in said.splitlines()[-1]
    assert place.current() == before
    assert place.call(command, *more, "--allow-drop", "1") == 0
    assert place.served() == {"a0", "a1", "a3", "a4", "a5"}


def test_a_folder_that_is_gone_may_go_where_that_is_asked_for_and_nothing_else(place: Place) -> None:
    assert place.call("run") == 0
    take_away(place)
    rewrite(place.adapters / "a3", use_dora=True)
    assert place.call("run", "--allow-missing") == 1
    assert place.call("run", "--allow-missing", "--allow-drop", "0") == 1
    place.upload("a3")
    assert place.call("run", "--allow-missing") == 0
    assert place.served() == {"a0", "a1", "a3", "a4", "a5"}


def test_a_run_that_would_drop_keeps_its_parts_for_who_allows_it(place: Place) -> None:
    assert place.call("run") == 0
    break_config(place)
    assert place.call("run") == 1
    assert any((place.out / "work").rglob("*.json"))
    assert place.call("run", "--allow-drop", "all") == 0
    assert not any((place.out / "work").rglob("*.json"))


@pytest.mark.parametrize(("allowed", "status"), [(None, 1), ("33%", 1), ("1", 1), ("34%", 0), ("2", 0), ("100%", 0)])
def test_a_first_run_that_refuses_much_publishes_nothing_unless_it_may(
    place: Place, allowed: str | None, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a4", "a5"):
        rewrite(place.adapters / name, use_dora=True)
    more = [] if allowed is None else ["--max-refused", allowed]
    assert place.call("run", *more) == status
    printed = capsys.readouterr()
    assert place.served() == (set() if status else {"a0", "a1", "a2", "a3"})
    if status:
        last = printed.err.splitlines()[-1]
        assert "2 of 6 adapters are refused (2 dora)" in last
        assert printed.err.count("refused    a4 (dora): ") == 1
        assert "--max-refused 2" in last
    else:
        assert printed.out.startswith("warning    2 of 6 adapters were refused")


def test_few_refusals_are_a_warning_at_the_top(
    generated: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(6, 12):
        place.upload(f"a{number}")
    rewrite(place.adapters / "a11", use_dora=True)
    assert place.call("run") == 0
    assert capsys.readouterr().out.startswith("warning    1 of 12 adapters were refused")


def test_the_same_line_after_a_removal_leaves_it_out_and_says_so(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.call("run") == 0
    assert place.call("remove", "--adapter", "a1") == 0
    capsys.readouterr()
    for command in ("run", "add", "run"):
        assert place.call(command) == 0
        printed = capsys.readouterr()
        assert "a1" not in place.served()
        assert "--restore a1 brings it back" in printed.out + printed.err
    assert place.call("add", "--adapter", "a1") == 2
    assert place.call("run", "--restore", "a9") == 2
    assert place.call("run", "--restore", "a1") == 0
    assert "a1" in place.served()
    assert place.call("run") == 0
    assert "a1" in place.served()


def test_add_restores_what_was_removed(place: Place) -> None:
    assert place.call("run") == 0
    assert place.call("remove", "--adapter", "a1", "a2") == 0
    assert place.call("add", "--restore", "a2") == 0
    assert place.served() == {"a0", "a2", "a3", "a4", "a5"}
    assert place.call("add") == 0
    assert "a1" not in place.served()


def test_compact_without_an_adapter_is_a_removal(place: Place) -> None:
    assert place.call("run") == 0
    take_away(place)
    assert place.call("compact", "--without", "a1", "a2") == 0
    assert place.served() == {"a0", "a3", "a4", "a5"}
    place.upload("a2")
    assert place.call("run") == 0
    assert "a2" not in place.served()
    assert "a1" not in place.served()
    assert place.call("run", "--restore", "a1") == 0
    assert "a1" in place.served()


def test_a_removal_that_could_not_be_published_is_none(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress_jobs.lifecycle import remove

    def fail(*_: object) -> None:
        raise StoreMissing("no such bucket")

    assert place.call("run") == 0
    with monkeypatch.context() as patched:
        patched.setattr(remove, "publish_next", fail)
        assert place.call("remove", "--adapter", "a1") == 1
    place.upload("a6")
    assert place.call("run") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "a6"}


def test_rollback_brings_back_what_was_removed_and_drops_what_was_added_only_where_told(place: Place) -> None:
    assert place.call("run") == 0
    place.upload("a6")
    assert place.call("add") == 0
    assert place.call("rollback") == 1
    assert "a6" in place.served()
    assert place.call("rollback", "--allow-drop", "1") == 0
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5"}
    assert place.call("remove", "--adapter", "a1") == 0
    assert place.call("rollback") == 0
    assert place.call("run") == 0
    assert place.served() >= {"a0", "a1", "a2", "a3", "a4", "a5"}


def test_names_of_the_base_that_a_run_has_accepted_are_accepted_from_then_on(place: Place) -> None:
    rewrite(place.adapters / "a1", base_model_name_or_path=OTHER_NAME)
    assert place.call("run", "--accept-base", OTHER_NAME) == 0
    assert Bundle.open(str(place.out)).manifest.base.accepted == (OTHER_NAME,)
    place.upload("a6")
    rewrite(place.adapters / "a6", base_model_name_or_path=OTHER_NAME)
    assert place.call("add") == 0
    assert place.call("compact", "--without", "a0") == 0
    assert place.served() == {"a1", "a2", "a3", "a4", "a5", "a6"}
    rewrite(place.adapters / "a2", base_model_name_or_path="another/name")
    assert place.call("update", "--accept-base", "another/name") == 0
    assert Bundle.open(str(place.out)).manifest.base.accepted == ("another/name", OTHER_NAME)


def test_of_a_run_and_a_removal_at_once_the_removal_is_not_undone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.call("run") == 0
    place.upload("a6")

    def remove_meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(job, "assemble_all", assemble_all)
        remove_adapters(str(place.out), ["a1"])
        return assemble_all(*arguments)

    assemble_all = job.assemble_all
    monkeypatch.setattr(job, "assemble_all", remove_meanwhile)
    assert place.call("run") == 1  # CURRENT has moved
    assert place.call("run") == 0
    assert place.served() == {"a0", "a2", "a3", "a4", "a5", "a6"}


def test_an_adapter_that_is_added_while_compact_prepares_is_not_dropped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.call("run") == 0
    prepare = preparing.prepare

    def add_meanwhile(options: RunOptions) -> preparing.Job:
        monkeypatch.setattr(preparing, "prepare", prepare)
        place.upload("a6")
        assert place.call("add") == 0
        return prepare(options)

    monkeypatch.setattr(preparing, "prepare", add_meanwhile)
    assert place.call("compact", "--without", "a1") == 1
    assert place.served() == {"a0", "a1", "a2", "a3", "a4", "a5", "a6"}
    assert place.call("compact", "--without", "a1") == 0
    assert place.served() == {"a0", "a2", "a3", "a4", "a5", "a6"}


def test_a_removal_right_after_a_run_has_published_is_not_forgotten(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.call("run") == 0
    place.upload("a6")
    render = finish.render

    def remove_meanwhile(*arguments: Any) -> str:
        remove_adapters(str(place.out), ["a1"])
        return render(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(finish, "render", remove_meanwhile)
        assert place.call("run") == 0
    assert place.call("run") == 0
    assert place.served() == {"a0", "a2", "a3", "a4", "a5", "a6"}


def test_where_the_current_revision_cannot_be_read_refusals_count_as_in_a_first_run(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place.call("run") == 0
    (manifest,) = place.out.glob("bundles/*/revisions/0/manifest.json")
    manifest.write_bytes(manifest.read_bytes() + b"x")
    for name in ("a4", "a5"):
        rewrite(place.adapters / name, use_dora=True)
    assert place.call("run") == 1
    printed = capsys.readouterr().err
    assert "what is served cannot be told" in printed
    assert "--max-refused 2" in printed


def test_a_removal_that_failed_lets_no_rollback_drop_the_adapter(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place.call("run") == 0
    place.upload("a6")
    assert place.call("add") == 0
    note_removed(open_store(str(place.out)), ["a6"])  # and killed before it published
    assert place.call("rollback") == 1
    assert "a6" in place.served()


def test_what_was_removed_can_be_compacted_away_when_its_folder_is_gone(place: Place) -> None:
    assert place.call("run") == 0
    assert place.call("remove", "--adapter", "a1") == 0
    shutil.rmtree(place.adapters / "a1")
    before = Bundle.open(str(place.out)).manifest
    assert place.call("compact", "--without", "a1") == 0
    after = Bundle.open(str(place.out)).manifest
    assert after.clusters["0"].basis != before.clusters["0"].basis
    assert after.adapters.keys() == before.adapters.keys()


def test_what_compact_leaves_out_is_remembered_though_it_was_not_served(place: Place) -> None:
    assert place.call("run") == 0
    place.upload("a6")
    assert place.call("compact", "--without", "a6") == 0
    assert place.call("run") == 0
    assert "a6" not in place.served()


def test_restore_restores_or_says_why_not_and_may_be_repeated(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    assert place.call("run") == 0
    assert place.call("remove", "--adapter", "a1", "a2") == 0
    shutil.rmtree(place.adapters / "a1")
    rewrite(place.adapters / "a2", use_dora=True)
    for command in ("run", "add"):
        assert place.call(command, "--restore", "a1") == 2
        assert "--restore a1: no such folder" in capsys.readouterr().err
        assert place.call(command, "--restore", "a2") == 1
        assert "adapter 'a2' refused (dora)" in capsys.readouterr().err
    for _ in range(2):
        place.upload("a1")
        assert place.call("run", "--restore", "a1") == 0
        assert "a1" in place.served()


def test_a_removed_checkpoint_is_restored_by_its_id(place: Place) -> None:
    place.upload("a6", to="a0/best")
    place.upload("a7", to="a0/last")
    assert place.call("run", "--checkpoints") == 0
    assert place.call("remove", "--adapter", "a0/best", "a0/last") == 0
    assert place.call("run", "--restore", "a0/best") == 0
    assert "a0/best" in place.served()
    assert place.call("add", "--restore", "a0/last") == 0
    assert "a0/last" in place.served()


NAMES = st.sampled_from([f"a{number}" for number in range(7)])
NUMBERS = st.integers(0, 6)


def pick(names: AbstractSet[str], number: int) -> str:
    return sorted(names)[number % len(names)]


class Lineage(RuleBasedStateMachine):
    """Uploads, deletions, damage and commands in any order. ``removed`` are the adapters that were taken out on purpose
    and not asked for again."""

    generated: Path
    root: Path
    number = 0
    ended: Counter[tuple[str, bool]]

    def __init__(self) -> None:
        super().__init__()
        Lineage.number += 1
        self.place = Place(self.generated, self.root / str(Lineage.number), 4)
        self.removed: set[str] = set()

    def call(
        self,
        command: str,
        *more: str,
        gone: AbstractSet[str] = frozenset(),
        dropped: AbstractSet[str] = frozenset(),
        back: AbstractSet[str] = frozenset(),
    ) -> None:
        """``gone`` may go for good by this command, ``dropped`` go, ``back`` come back; nothing else may."""
        before = self.place.served()
        status = self.place.call(command, *more)
        after = self.place.served()
        assert status in (0, 1, 2)
        self.ended[command, status == 0] += 1
        assert before - after <= gone | dropped, f"{command} {more} dropped {before - after}"
        assert after & self.removed <= back, f"{command} {more} brought back {after & self.removed}"
        self.removed -= after
        if status == 0:
            self.removed |= (before - after) & gone

    @initialize()
    def publish(self) -> None:
        self.call("run")

    @rule(name=NAMES)
    def upload(self, name: str) -> None:
        self.place.upload(name)

    @rule(name=NAMES)
    def take_away(self, name: str) -> None:
        shutil.rmtree(self.place.adapters / name, ignore_errors=True)

    @rule(name=NAMES, changes=st.sampled_from([{"use_dora": True}, {"base_model_name_or_path": OTHER_NAME}]))
    def damage(self, name: str, changes: dict[str, Any]) -> None:
        if (self.place.adapters / name).exists():
            rewrite(self.place.adapters / name, **changes)

    @rule(more=st.sampled_from([(), ("--accept-base", OTHER_NAME), ("--max-refused", "100%")]))
    def run(self, more: tuple[str, ...]) -> None:
        self.call("run", *more)

    @precondition(lambda self: self.removed)
    @rule(number=NUMBERS)
    def run_restoring(self, number: int) -> None:
        name = pick(self.removed, number)
        self.call("run", "--restore", name, back={name})

    @precondition(lambda self: self.place.served())
    @rule()
    def add(self) -> None:
        self.call("add")

    @precondition(lambda self: self.place.served())
    @rule()
    def update(self) -> None:
        self.call("update")

    @precondition(lambda self: self.place.served())
    @rule()
    def compact(self) -> None:
        self.call("compact", "--drift", "-1")

    @precondition(lambda self: self.removed)
    @rule(number=NUMBERS)
    def add_restoring(self, number: int) -> None:
        name = pick(self.removed, number)
        self.call("add", "--restore", name, back={name})

    @precondition(lambda self: self.place.served())
    @rule(number=NUMBERS)
    def remove(self, number: int) -> None:
        name = pick(self.place.served(), number)
        self.call("remove", "--adapter", name, gone={name})

    @precondition(lambda self: self.place.served())
    @rule(number=NUMBERS)
    def compact_without(self, number: int) -> None:
        name = pick(self.place.served(), number)
        self.call("compact", "--without", name, gone={name})

    @precondition(lambda self: self.place.served())
    @rule(allow_drop=st.booleans())
    def roll_back(self, allow_drop: bool) -> None:
        """It says what it brings back."""
        dropped = self.place.served() if allow_drop else frozenset()
        more = ("--allow-drop", "all") if allow_drop else ()
        self.call("rollback", *more, dropped=dropped, back=set(self.removed))

    @invariant()
    def what_is_served_is_whole(self) -> None:
        if self.place.served():
            bundle = Bundle.open(str(self.place.out))
            for home in bundle.serving_map.homes():
                assert not bundle.load_home(home).failed


@pytest.mark.by_hand
@pytest.mark.slow
def test_any_sequence_of_uploads_damage_and_commands_keeps_both_promises(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "connect", lambda _: None)
    monkeypatch.setattr(Lineage, "generated", generated, raising=False)
    monkeypatch.setattr(Lineage, "root", tmp_path, raising=False)
    bounds = settings(
        max_examples=30,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    monkeypatch.setattr(Lineage, "ended", Counter(), raising=False)
    run_state_machine_as_test(Lineage, settings=bounds)
    commands = ("run", "add", "update", "compact", "remove", "rollback")
    assert all(Lineage.ended[command, True] for command in commands), Lineage.ended
    assert all(Lineage.ended[command, False] for command in ("run", "rollback", "compact")), Lineage.ended
