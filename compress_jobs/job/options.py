"""The options of a run: one frozen dataclass, filled from the command line and a TOML file."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from cluster.adapters.layout import Layout
from cluster.bundle.manifest import ISOLATIONS, METHODS, Method
from cluster.errors import ConfigError
from cluster.units import parse_size

DTYPES = ("bfloat16", "float32")
DROPS = re.compile(r"[0-9]{1,9}|all")
"""How many adapters that are served a command may drop."""
AUTO = "auto"
"""For method, clusters and rank: chosen by the job, for the fewest bytes that meet ``target_error``. For the gate: by
what the adapters keep."""
_KEEP = 0.99


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
    gate: float | str = _option(
        AUTO,
        "largest squared relative error of an adapter on a basis; one beyond it is served truncated by SVD, or whole; "
        "auto: the largest that keeps --keep, judged by --tasks, else by the adapters' own text where the base can be "
        "loaded, else the paper's 0.6",
        metavar="E",
    )
    keep: float = _option(
        _KEEP,
        "what gate auto aims at: the share kept of what the adapters gain over the base, in the mean",
        metavar="S",
    )
    tasks: str = _option(
        "", "for gate auto: held-out rows by adapter, JSON lines with name, question, test", metavar="FILE"
    )
    isolate: str = _option(
        "", "tenant: no cluster holds adapters of two tenants (of ids tenant/name)", choices=ISOLATIONS
    )
    only: tuple[str, ...] = _option(
        (), "adapters to take, and no others: an id or a pattern with * (repeatable)", metavar="PATTERN"
    )
    without: tuple[str, ...] = _option(
        (), "adapters left out as if they were not there: an id or a pattern with * (repeatable)", metavar="PATTERN"
    )
    id_pattern: tuple[str, ...] = _option(
        (),
        "what names the adapters, where their folders are not name or tenant/name: a path with {name}, {tenant} and *, "
        "such as {tenant}/{name}/artifacts/model (repeatable, the first that matches counts)",
        metavar="PATTERN",
    )
    checkpoints: bool = _option(False, "folders within an adapter's folder are adapters too")
    raw: tuple[str, ...] = _option(
        (), "adapters served whole, uncompressed: an id or a pattern with * (repeatable)", metavar="PATTERN"
    )
    restore: tuple[str, ...] = _option((), "adapter that was removed, to be taken up again (repeatable)", metavar="ID")
    max_refused: str = _option(
        "10%",
        "where nothing is published yet: how many adapters may be refused, a number or a share, before the run fails",
        metavar="N|N%",
    )
    allow_missing: bool = _option(False, "adapters that are served and have no folder any more may be dropped")
    allow_drop: str = _option(
        "0", "how many adapters that are served may no longer be, a number or all", metavar="N|all"
    )
    accept_base: tuple[str, ...] = _option(
        (), "further name adapters may call this base by, or a pattern with * (repeatable)", metavar="PATTERN"
    )
    accept_unnamed_base: bool = _option(False, "adapters whose config names no base are accepted")
    base_name: str = _option("", "the base's own name, where its config does not say", metavar="NAME")
    seed: int = _option(0, "seed of clustering and of the iteration's start", metavar="S")
    dtype: str = _option("bfloat16", "dtype of the stored tensors", choices=DTYPES)
    num_cpus: int = _option(
        0, "CPUs of the Ray that is started here where RAY_ADDRESS names none (0: all)", metavar="N"
    )
    in_flight: int = _option(0, "Ray tasks in flight at once (0: twice the CPUs)", metavar="N")
    task_memory: str = _option(
        "", "memory that one fit task may take, such as 2GiB (default: a node's over its CPUs)", metavar="SIZE"
    )

    def __post_init__(self) -> None:
        for name in ("adapters", "base", "out"):
            need(getattr(self, name) != "", name, "is missing", f"give --{name} or put it into the --config file")
        for name in ("clusters", "rank"):
            value = getattr(self, name)
            whole = isinstance(value, int) and value >= 1
            need(whole or value == AUTO, name, f"is {value!r}", "expected 1 or more, or auto")
        methods = (*METHODS, AUTO)
        need(self.method in methods, "method", f"is {self.method!r}", f"expected one of {', '.join(methods)}")
        if self.auto:
            seen = f"is {self.target_error or 'missing'}"
            need(0 < self.target_error < 1, "target-error", seen, f"between 0 and 1 for {' and '.join(self.auto)} auto")
        else:
            need(not self.target_error, "target-error", "is given", "it is for --method, --clusters or --rank auto")
        isolations = ("", *ISOLATIONS)
        need(self.isolate in isolations, "isolate", f"is {self.isolate!r}", f"expected {' or '.join(ISOLATIONS)}")
        need(self.dtype in DTYPES, "dtype", f"is {self.dtype!r}", f"expected one of {', '.join(DTYPES)}")
        need(
            DROPS.fullmatch(self.allow_drop) is not None,
            "allow-drop",
            f"is {self.allow_drop!r}",
            "expected a number or all",
        )
        refusable = re.fullmatch(r"([0-9]{1,9})(%?)", self.max_refused)
        need(
            refusable is not None and (not refusable[2] or int(refusable[1]) <= 100),
            "max-refused",
            f"is {self.max_refused!r}",
            "expected a number, or a share such as 10%",
        )
        accepted_names(self.accept_base, self.accept_unnamed_base)
        Layout(self.id_pattern)
        given = self.gate != AUTO
        need(
            not given or (isinstance(self.gate, float | int) and 0 < self.gate <= 1),
            "gate",
            f"is {self.gate}",
            "expected a squared relative error above 0, at most 1, or auto",
        )
        need(0 < self.keep < 1, "keep", f"is {self.keep}", "expected a share between 0 and 1, such as 0.99")
        need(not (given and self.tasks), "tasks", "is given", "it is for --gate auto: leave one of the two out")
        need(not given or self.keep == _KEEP, "keep", "is given", "it is for --gate auto: leave one of the two out")
        need(0 <= self.seed < 2**31, "seed", f"is {self.seed}", "expected 0 to 2147483647")
        need(self.num_cpus >= 0, "num-cpus", f"is {self.num_cpus}", "expected 0 or more")
        need(self.in_flight >= 0, "in-flight", f"is {self.in_flight}", "expected 0 or more")
        if self.task_memory:
            try:
                parse_size(self.task_memory)
            except ValueError as error:
                raise ConfigError(f"--task-memory is {self.task_memory!r}; expected {error}") from None

    @property
    def base_names(self) -> tuple[str, ...]:
        """What adapters may call the base by besides its own name; "" stands for no name."""
        return accepted_names(self.accept_base, self.accept_unnamed_base)

    @property
    def layout(self) -> Layout:
        return Layout(self.id_pattern, self.checkpoints)

    @property
    def auto(self) -> tuple[str, ...]:
        """Which of method, clusters and rank the job is to choose."""
        return tuple(name for name in ("clusters", "method", "rank") if getattr(self, name) == AUTO)

    def with_choice(self, method: str, clusters: int, rank: int) -> RunOptions:
        """Nothing left to choose. (``target_error`` goes with it; ``recorded_method`` is asked of the original.)"""
        return dataclasses.replace(self, method=method, clusters=max(clusters, 1), rank=rank, target_error=0.0)

    def with_gate(self, gate: float) -> RunOptions:
        """The gate is settled. (``recorded_method`` is asked of the original, for ``keep``.)"""
        return dataclasses.replace(self, gate=gate, keep=_KEEP, tasks="")

    def recorded_method(
        self,
        method: str,
        clusters: int,
        rank: int,
        gate: float,
        evidence: str | None = None,
        tasks: str | None = None,
    ) -> Method:
        """What decides the bundle's bytes, as the manifest records it, with what was chosen; ``tasks``: the hash of
        that file."""
        return Method(
            name=method,
            clusters=0 if method == "svd" else clusters,
            rank=rank,
            seed=self.seed,
            dtype=self.dtype,
            gate=gate,
            raw=tuple(sorted(set(self.raw))),
            auto=self.auto,
            target_error=self.target_error or None,
            isolation=self.isolate or None,
            evidence=evidence,
            keep=self.keep if evidence else None,
            tasks=tasks,
        )

    def may_refuse(self, num_refused: int, of: int) -> bool:
        if self.max_refused.endswith("%"):
            return 100 * num_refused <= int(self.max_refused[:-1]) * of
        return num_refused <= int(self.max_refused)

    @property
    def needs_sample(self) -> bool:
        """Whether there is anything to cluster or to choose by."""
        return self.method != "svd" and (self.clusters != 1 or bool(self.auto))

    def is_raw(self, adapter_id: str) -> bool:
        return bool(matching([adapter_id], self.raw))

    def takes(self, adapter_id: str) -> bool:
        """Whether ``only`` and ``without`` leave it in."""
        return not matching([adapter_id], self.without) and (not self.only or bool(matching([adapter_id], self.only)))


def may_drop(allow_drop: str, num_dropped: int) -> bool:
    """``allow_drop`` as ``DROPS`` has it."""
    return allow_drop == "all" or num_dropped <= int(allow_drop)


def accepted_names(accept_base: Iterable[str], accept_unnamed_base: bool) -> tuple[str, ...]:
    """As ``read_base`` takes them and the manifest keeps them. Raises ConfigError."""
    names = tuple(accept_base)
    need(
        "" not in names, "accept-base", "is empty", "expected a name; --accept-unnamed-base is for configs without one"
    )
    return (*names, *([""] if accept_unnamed_base else []))


def matching(ids: Iterable[str], patterns: Collection[str]) -> set[str]:
    """Of the ids those that are, or match, one of the patterns."""
    return {i for i in ids if any(fnmatch.fnmatchcase(i, pattern) for pattern in patterns)}


def need(condition: bool, name: str, seen: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{name if ' ' in name else '--' + name} {seen}; {expected}")
