"""Options of the job: command line and TOML say the same, and what is not known is refused."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from compress_jobs.__main__ import main
from compress_jobs.commands.run_options import add_arguments, from_arguments
from compress_jobs.job.options import RunOptions

REQUIRED = ["--adapters", "a", "--base", "b", "--out", "c"]


def parse(*line: str) -> RunOptions:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(line))


def test_a_file_and_a_line_give_the_same_options(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'adapters = "a"\nbase = "b"\nout = "c"\nclusters = 3\nrank = 8\ngate = 0.5\nmethod = "svd"\n'
        'raw = ["x", "t/*"]\naccept-base = "other"\nseed = 7\ndtype = "float32"\n'
    )
    line = ["--clusters", "3", "--rank", "8", "--gate", "0.5", "--method", "svd", "--raw", "x", "--raw", "t/*"]
    line += ["--accept-base", "other", "--seed", "7", "--dtype", "float32"]
    assert parse("--config", str(config)) == parse(*REQUIRED, *line)


def test_the_line_wins_over_the_file_even_with_a_default_value(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text("rank = 8\nclusters = 4\n")
    options = parse("--config", str(config), *REQUIRED, "--rank", "16")
    assert (options.rank, options.clusters) == (16, 4)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ([], "--adapters is missing"),
        ([*REQUIRED, "--rank", "0"], "--rank is 0"),
        ([*REQUIRED, "--clusters", "-1"], "--clusters is -1"),
        ([*REQUIRED, "--gate", "1.5"], "--gate is 1.5"),
        ([*REQUIRED, "--gate", "nan"], "--gate is nan"),
        ([*REQUIRED, "--seed", "-3"], "--seed is -3"),
        ([*REQUIRED, "--task-memory", "2 gigs"], "--task-memory is '2 gigs'; expected a size such as 80GiB"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
    ],
)
def test_a_wrong_option_is_named_with_exit_status_2(
    line: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *line]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rnak = 8", "unknown key 'rnak'"),
        ('rank = "8"', "expected int"),
        ("rank = true", "expected int"),
        ("raw = [1]", "expected strings"),
        ("rank = ", "not TOML"),
        ('method = "jd-dia"', "jd-full, jd-diag, svd, auto"),
        ('clusters = "many"', "expected int"),
        ('seed = "auto"', "expected int"),
        ('rank = "auto"', "target-error is missing"),
        ("target_error = 0.1", "it is for"),
        ('isolate = "team"', "expected tenant"),
    ],
)
def test_a_wrong_config_file_is_refused_by_key(tmp_path: Path, text: str, named: str) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text)
    with pytest.raises(ConfigError, match=named):
        parse("--config", str(config), *REQUIRED)


def test_help_teaches_and_needs_no_ray(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "ray job submit" in printed
    assert "AWS_ENDPOINT_URL" in printed
    assert all(f"--{name.replace('_', '-')}" in printed for name in RunOptions.__dataclass_fields__)
