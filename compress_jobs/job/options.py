"""The options of a run: one frozen dataclass, filled from the command line and a TOML file."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bundle.manifest import ISOLATIONS, METHODS, Method
from cluster.errors import ConfigError

DTYPES = ("bfloat16", "float32")
AUTO = "auto"
"""For method, clusters and rank: chosen by the job, for the fewest bytes that meet ``target_error``."""


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class RunOptions:
    """What ``compress_jobs run`` is asked to do. Raises ConfigError from its constructor."""

    adapters: str = _option(
        "", "collection of PEFT adapters, a folder each: s3://bucket/prefix or a path", metavar="URI"
    )
    base: str = _option(
        "", "base model's folder: s3://bucket/prefix or a path (config and headers are read)", metavar="URI"
    )
    out: str = _option("", "where the bundle is published: s3://bucket/prefix or a path", metavar="URI")
    clusters: int | str = _option(
        1, "number of clusters, or auto (the paper: 25 for 1000 adapters, 1 up to about 100)", metavar="K"
    )
    rank: int | str = _option(
        16, "rank of each cluster's basis, or of each adapter with --method svd, or auto", metavar="R"
    )
    method: str = _option(
        "jd-full",
        "jd-full: adapters share bases, a matrix each; jd-diag: the same with a diagonal each; "
        "svd: each is truncated on its own; auto: whichever takes the fewest bytes",
        choices=(*METHODS, AUTO),
    )
    target_error: float = _option(
        0.0, "with auto: largest mean squared relative error; the fewest bytes that meet it win", metavar="E"
    )
    # Where adapters on a basis still keep 99% of their Rouge-L and of their loss (`sweep`, infra/results).
    gate: float = _option(
        0.25,
        "largest squared relative error an adapter is served with on a basis; beyond it is truncated less",
        metavar="E",
    )
    isolate: str = _option(
        "", "tenant: no cluster holds adapters of two tenants (of ids tenant/name)", choices=ISOLATIONS
    )
    without: tuple[str, ...] = _option((), "adapter left out as if it were not there (repeatable)", metavar="ID")
    raw: tuple[str, ...] = _option(
        (), "adapters served whole, uncompressed: an id or a pattern with * (repeatable)", metavar="PATTERN"
    )
    accept_base: tuple[str, ...] = _option(
        (), "further name adapters may call this base by (repeatable)", metavar="NAME"
    )
    base_name: str = _option("", "the base's own name, where its config does not say", metavar="NAME")
    seed: int = _option(0, "seed of clustering and of the iteration's start", metavar="S")
    dtype: str = _option("bfloat16", "dtype of the stored tensors", choices=DTYPES)
    num_cpus: int = _option(0, "CPUs of the Ray started here when none is running (0: all)", metavar="N")
    in_flight: int = _option(0, "Ray tasks in flight at once (0: twice the CPUs)", metavar="N")

    def __post_init__(self) -> None:
        for name in ("adapters", "base", "out"):
            _need(getattr(self, name) != "", name, "is missing", f"give --{name} or put it into the --config file")
        for name in ("clusters", "rank"):
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1
            _need(whole or value == AUTO, name, f"is {value!r}", "expected 1 or more, or auto")
        methods = (*METHODS, AUTO)
        _need(self.method in methods, "method", f"is {self.method!r}", f"expected one of {', '.join(methods)}")
        if self.auto:
            seen = f"is {self.target_error or 'missing'}"
            _need(
                0 < self.target_error < 1, "target-error", seen, f"between 0 and 1 for {' and '.join(self.auto)} auto"
            )
        else:
            _need(not self.target_error, "target-error", "is given", "it is for --method, --clusters or --rank auto")
        isolations = ("", *ISOLATIONS)
        _need(self.isolate in isolations, "isolate", f"is {self.isolate!r}", f"expected {' or '.join(ISOLATIONS)}")
        _need(self.dtype in DTYPES, "dtype", f"is {self.dtype!r}", f"expected one of {', '.join(DTYPES)}")
        _need(0 < self.gate <= 1, "gate", f"is {self.gate}", "expected a squared relative error above 0, at most 1")
        _need(0 <= self.seed < 2**31, "seed", f"is {self.seed}", "expected 0 to 2147483647")
        _need(self.num_cpus >= 0, "num-cpus", f"is {self.num_cpus}", "expected 0 or more")
        _need(self.in_flight >= 0, "in-flight", f"is {self.in_flight}", "expected 0 or more")

    @property
    def auto(self) -> tuple[str, ...]:
        """Which of method, clusters and rank the job is to choose."""
        return tuple(name for name in ("clusters", "method", "rank") if getattr(self, name) == AUTO)

    def with_choice(self, method: str, clusters: int, rank: int) -> RunOptions:
        """Nothing left to choose. (``target_error`` goes with it; ``recorded_method`` is asked of the original.)"""
        return dataclasses.replace(self, method=method, clusters=max(clusters, 1), rank=rank, target_error=0.0)

    def recorded_method(self, method: str, clusters: int, rank: int) -> Method:
        """What decides the bundle's bytes, as the manifest records it, with what was chosen."""
        return Method(
            name=method,
            clusters=0 if method == "svd" else clusters,
            rank=rank,
            seed=self.seed,
            dtype=self.dtype,
            gate=self.gate,
            raw=tuple(sorted(set(self.raw))),
            auto=self.auto,
            target_error=self.target_error or None,
            isolation=self.isolate or None,
        )

    @property
    def needs_sample(self) -> bool:
        """Whether there is anything to cluster or to choose by."""
        return self.method != "svd" and (self.clusters != 1 or bool(self.auto))

    def is_raw(self, adapter_id: str) -> bool:
        return any(fnmatch.fnmatchcase(adapter_id, pattern) for pattern in self.raw)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each field; defaults stay unset, so that a config file can be told from the command line."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with the same options, names with - or _"
    )
    for spec in dataclasses.fields(RunOptions):
        is_list = isinstance(spec.default, tuple)
        help_text = spec.metadata["help"]
        if not is_list and spec.default not in ("", 0, 0.0):
            help_text += f" (default: {spec.default})"
        more: dict[str, Any] = {key: value for key, value in spec.metadata.items() if key != "help"}
        if is_list:
            more["action"] = "append"
        else:
            more["type"] = _whole_or_auto if "int | str" in str(spec.type) else type(spec.default)
        parser.add_argument("--" + spec.name.replace("_", "-"), default=None, help=help_text, **more)


def _whole_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


_whole_or_auto.__name__ = "whole number or auto"  # argparse says this where it is not


def from_arguments(arguments: argparse.Namespace) -> RunOptions:
    """Command line over config file over defaults. Raises ConfigError."""
    values = _read_config(arguments.config) if arguments.config else {}
    for spec in dataclasses.fields(RunOptions):
        given = getattr(arguments, spec.name)
        if given is not None:
            values[spec.name] = tuple(given) if isinstance(spec.default, tuple) else given
    return RunOptions(**values)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML ({error})") from None
    specs = {spec.name: spec for spec in dataclasses.fields(RunOptions)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        spec = specs.get(key.replace("-", "_"))
        if spec is None:
            known = ", ".join(sorted(name.replace("_", "-") for name in specs))
            raise ConfigError(f"--config {path}: unknown key {key!r}; known keys are {known}")
        allows_auto = "int | str" in str(spec.type)
        where = f"--config {path}: {key}"
        values[spec.name] = value if allows_auto and value == AUTO else _typed(spec.default, value, where)
    return values


def _typed(default: Any, value: Any, where: str) -> Any:
    if isinstance(default, tuple):
        names = [value] if isinstance(value, str) else value
        _need(
            isinstance(names, list) and all(isinstance(name, str) for name in names),
            where,
            f"is {value!r}",
            "expected strings",
        )
        return tuple(names)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    _need(type(value) is type(default), where, f"is {value!r}", f"expected {type(default).__name__}")
    return value


def _need(condition: bool, name: str, seen: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name if ' ' in name else '--' + name} {seen}; {expected}")
