"""Ids by patterns, and the patterns that are found for collections several folders deep."""

from __future__ import annotations

import shlex

import pytest

from cluster.adapters.layout import Layout, layout_for, shown
from cluster.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "folder", "adapter_id"),
    [
        ("{name}", "one", "one"),
        ("{name}", "tenant/one", None),
        ("{tenant}/{name}/artifacts/model", "7/ab12/artifacts/model", "7/ab12"),
        ("{tenant}/{name}/artifacts/model", "7/ab12/artifacts/other", None),
        ("models--{tenant}--{name}/snapshots/*", "models--org--my--lora/snapshots/0f3c", "org/my--lora"),
        ("*/{name}", "x/y", "y"),
        ("*/{name}", "x/y/z", None),
        ("run-{name}.v*/best", "run-a.v12/best", "a"),
        ("a+{name}", "a+b", "b"),
        ("a+{name}", "aab", None),
    ],
)
def test_a_pattern_names_what_it_matches_whole(pattern: str, folder: str, adapter_id: str | None) -> None:
    assert Layout((pattern,)).id_of(folder) == adapter_id


def test_the_first_pattern_that_matches_names() -> None:
    layout = Layout(("tenant/{name}", "{tenant}/{name}"))
    assert layout.id_of("tenant/one") == "one"
    assert layout.id_of("other/one") == "other/one"


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "{tenant}", "{name}/{name}", "{name}/{id}", "/{name}", "{name}/", "{name}//x", "{name", "name}"],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="--id-pattern"):
        Layout((pattern,))


@pytest.mark.parametrize(
    ("folders", "patterns"),
    [
        (["1/a/artifacts/model", "1/b/artifacts/model", "2/c/artifacts/model"], ("{tenant}/{name}/artifacts/model",)),
        (["1/a/artifacts/model", "1/b/artifacts/model"], ("1/{name}/artifacts/model",)),
        (
            ["hub/models--org--a/snapshots/12", "hub/models--org--b/snapshots/34"],
            ("hub/models--{tenant}--{name}/snapshots/*",),
        ),
        (["mlruns/1/abcdef01/artifacts/model"], ("mlruns/1/{name}/artifacts/model",)),
        (["runs/alpha/artifacts/model"], ("runs/{name}/artifacts/model",)),
        (["a'b/x/c", "a'b/x/d"], ("a'b/x/{name}",)),
        (["x/y/lr=1", "x/y/lr=2"], None),
        (["a//b/c", "a//b/d"], None),
        (["x/2024/a/v1", "y/2024/b/v2", "y/2024/c/v2"], ("*/2024/{name}/*",)),
        (["x/1/a", "x/2/a", "y/1/a", "y/2/a"], ("{tenant}/{name}/a",)),
        (["a", "t/b", "1/2/c", "1/3/c"], ("{name}", "{tenant}/{name}", "1/{name}/c")),
    ],
)
def test_patterns_are_found_that_name_every_folder_of_a_deep_collection(
    folders: list[str], patterns: tuple[str, ...] | None
) -> None:
    layout = layout_for(folders)
    if patterns is None:
        assert layout is None
        return
    assert layout is not None
    assert layout.id_patterns == patterns
    assert len({layout.id_of(folder) for folder in folders}) == len(folders)


def test_two_snapshots_of_one_model_are_told_apart() -> None:
    folders = ["models--o--a/snapshots/1", "models--o--a/snapshots/2", "models--o--b/snapshots/3"]
    layout = layout_for(folders)
    assert layout is not None
    assert len({layout.id_of(folder) for folder in folders}) == 3


def test_patterns_that_would_give_a_taken_id_are_not_found() -> None:
    assert layout_for(["x/y/roman", "x/y/b"], {"roman"}) is None
    assert layout_for(["x/y/roman", "x/y/b"], {"other"}) is not None


def test_options_are_quoted_for_a_shell() -> None:
    patterns = ["a';touch pwn;'b/{name}", "{tenant}/{name}"]
    assert shlex.split(shown(patterns)) == ["--id-pattern", patterns[0], "--id-pattern", patterns[1]]
