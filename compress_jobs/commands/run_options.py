"""The options of ``run`` from the command line and a TOML file: one for each field of ``RunOptions``."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from compress_jobs.host.text import read_text
from compress_jobs.job.options import AUTO, RunOptions, need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each field; defaults stay unset, so that a config file can be told from the command line."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with the same options, names with - or _"
    )
    for spec in dataclasses.fields(RunOptions):
        is_list = isinstance(spec.default, tuple)
        help_text = spec.metadata["help"]
        if not is_list and spec.default not in ("", 0, 0.0, "0", False):
            help_text += f" (default: {spec.default})".replace("%", "%%")  # argparse formats it
        more: dict[str, Any] = {key: value for key, value in spec.metadata.items() if key != "help"}
        if is_list:
            more["action"] = "append"
        elif isinstance(spec.default, bool):
            more["action"] = "store_true"
        else:
            more["type"] = _OR_AUTO.get(str(spec.type), type(spec.default))
        parser.add_argument("--" + spec.name.replace("_", "-"), default=None, help=help_text, **more)


def _whole_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


def number_or_auto(text: str) -> float | str:
    return text if text == AUTO else float(text)


# argparse says these where they are not.
_whole_or_auto.__name__, number_or_auto.__name__ = "whole number or auto", "number or auto"
_OR_AUTO: dict[str, Any] = {"int | str": _whole_or_auto, "float | str": number_or_auto}


def from_arguments(arguments: argparse.Namespace) -> RunOptions:
    """Command line over config file over defaults. Raises ConfigError."""
    values = _read_config(arguments.config) if arguments.config else {}
    for spec in dataclasses.fields(RunOptions):
        given = getattr(arguments, spec.name)
        if given is not None:
            values[spec.name] = tuple(given) if isinstance(spec.default, tuple) else given
    return RunOptions(**values)


def _read_config(path: Path) -> dict[str, Any]:
    text = read_text("--config", path, "a TOML file")
    try:
        # What old editors end lines with is no line's end in TOML.
        document = tomllib.loads(text.replace("\r\n", "\n").replace("\r", "\n"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not TOML ({error})") from None
    specs = {spec.name: spec for spec in dataclasses.fields(RunOptions)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        spec = specs.get(key.replace("-", "_"))
        if spec is None:
            known = ", ".join(sorted(name.replace("_", "-") for name in specs))
            raise ConfigError(f"--config {path}: unknown key {key!r}; known keys are {known}")
        where = f"--config {path}: {key}"
        default = 0.0 if str(spec.type) == "float | str" else spec.default
        if str(spec.type) not in _OR_AUTO or value != AUTO:
            value = _typed(default, value, where, " or auto" if str(spec.type) in _OR_AUTO else "")
        values[spec.name] = value
    return values


def _typed(default: Any, value: Any, where: str, otherwise: str = "") -> Any:
    if isinstance(default, tuple):
        names = [value] if isinstance(value, str) else value
        need(
            isinstance(names, list) and all(isinstance(name, str) for name in names),
            where,
            f"is {value!r}",
            "expected strings",
        )
        return tuple(names)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, str) and default[:1].isdigit() and type(value) is int:
        return str(value)  # a number, or a word
    need(type(value) is type(default), where, f"is {value!r}", f"expected {type(default).__name__}{otherwise}")
    return value
