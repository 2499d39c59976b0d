"""The application's arguments: what ``serve run serve_app.app:build key=value`` and a Serve config file may say.

A command line hands over flat strings (``limits.max_batch=16``), a config file nested YAML
(``limits: {max_batch: 16}``). Both end in the same frozen ``Arguments``; a key that is not known, or a value
that is not what the key expects, is a ConfigError that names it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from cluster.errors import ConfigError
from serve_app.argument_values import (
    Parser,
    at_least,
    at_most,
    auto_or,
    from_0,
    one_of,
    origins,
    part,
    percent,
    positive,
    size,
    text,
    whole,
    yes_or_no,
)

ENGINES = ("auto", "transformers", "vllm")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
AT_ZERO = ("wait", "refuse")
STRUCTURED_OUTPUTS = ("auto", "xgrammar", "guidance", "outlines", "lm-format-enforcer")

# What a replica says of its load is up to so old.
LEAST_DOWNSCALE_DELAY_S = 20.0

# What Serve sends from a router to a replica is one message, of 4 MiB at most.
MOST_BODY_BYTES = 3 << 20

Auto = Literal["auto"]
T = TypeVar("T")


@dataclass(frozen=True)
class PlacementArguments:
    """How the bundle's clusters are laid over groups, and what each replica asks of the Ray cluster.

    ``devices`` is how many replicas can be held (GPUs, or machines on CPU), ``replicas`` and ``num_cpus``
    are of each group, ``device_memory`` is bytes of one device. ``headroom`` is the share of its adapters for which
    each replica has room besides, for those that the next revision changes or adds. ``max_surge_percent``: how many
    replicas a deploy may start before it stops those that it replaces.
    """

    clusters_per_group: Annotated[int | Auto, auto_or(whole(1))] = "auto"
    devices: Annotated[int | Auto, auto_or(whole(1))] = "auto"
    replicas: Annotated[int, whole(1)] = 1
    num_cpus: Annotated[float, positive] = 1.0
    device_memory: Annotated[int | Auto, auto_or(size)] = "auto"
    headroom: Annotated[float, from_0] = 0.25
    max_surge_percent: Annotated[int, percent] = 100


@dataclass(frozen=True)
class AutoscalingArguments:
    """Of each group: where ``max`` is given it has ``min`` to ``max`` replicas, as many as give each ``target_ongoing``
    sequences, and another number only when the load has asked for that for a delay. ``at_zero``: whether a request that
    finds no replica waits for the one it wakes, or is answered 503. ``share_devices``: the groups' ``max`` together may
    be more than there are devices, for the Serve config has the policy that shares them out."""

    max: Annotated[int | None, whole(1)] = None
    min: Annotated[int, whole(0)] = 1
    target_ongoing: Annotated[float, positive] = 16.0
    upscale_delay_s: Annotated[float, from_0] = 10.0
    downscale_delay_s: Annotated[float, at_least(LEAST_DOWNSCALE_DELAY_S, positive)] = 600.0
    at_zero: Annotated[str, one_of(*AT_ZERO)] = "wait"
    share_devices: Annotated[bool, yes_or_no] = False


@dataclass(frozen=True)
class StartArguments:
    """The application is RUNNING when ``ready_share`` of its homes serve; its start fails after ``timeout_s``."""

    ready_share: Annotated[float, part] = 0.5
    timeout_s: Annotated[float, positive] = 600.0


@dataclass(frozen=True)
class LimitArguments:
    """``max_batch`` sequences of at most ``max_model_len`` tokens run together in a replica; ``max_inflight``
    sequences of a group may run or wait before the router answers 429; a request for more than ``max_prompts``
    sequences is refused, and so is a body above ``max_body`` bytes; one that takes longer than ``request_timeout_s`` is
    given up (504)."""

    max_batch: Annotated[int, whole(1)] = 32
    max_model_len: Annotated[int, whole(2)] = 2048
    max_inflight: Annotated[int, whole(1)] = 256
    max_prompts: Annotated[int, whole(1)] = 64
    max_body: Annotated[int, at_most(MOST_BODY_BYTES, size)] = MOST_BODY_BYTES
    request_timeout_s: Annotated[float, positive] = 300.0


@dataclass(frozen=True)
class HttpArguments:
    """A body that is not there after ``receive_timeout_s`` is a 408. A stream that waits for its first token gets a
    comment every ``sse_keep_alive_s`` seconds, so that nothing on the way thinks it dead. ``allowed_origins``: whose
    pages a browser lets read answers (CORS)."""

    receive_timeout_s: Annotated[float, positive] = 30.0
    sse_keep_alive_s: Annotated[float, positive] = 15.0
    allowed_origins: Annotated[tuple[str, ...], origins] = ()


@dataclass(frozen=True)
class VllmArguments:
    """Of the vLLM engine alone, by the names of vLLM's server and with its meanings."""

    tool_call_parser: Annotated[str | None, text] = None
    enable_auto_tool_choice: Annotated[bool, yes_or_no] = False
    reasoning_parser: Annotated[str | None, text] = None
    chat_template: Annotated[str | None, text] = None
    # Not auto: there the first request's backend compiles all others', which may end in a 500.
    structured_outputs_backend: Annotated[str, one_of(*STRUCTURED_OUTPUTS)] = "xgrammar"


@dataclass(frozen=True)
class Arguments:
    """``bundle`` is ``<out>`` or ``<out>/bundles/<id>``; ``base`` a local folder, an ``s3://`` prefix or a hub id.
    ``adapter_chat_templates``: chats of an adapter that brought a template go through that, else through the base's.
    Aliases and CURRENT are looked at every ``refresh_interval_s`` seconds, and CURRENT's next revision of the bundle is
    served; not where ``revision`` pins one.
    ``routers`` share what a group admits: each has its part of ``limits.max_inflight``."""

    bundle: Annotated[str, text]
    base: Annotated[str, text]
    revision: Annotated[int | None, whole(0)] = None
    engine: Annotated[str, one_of(*ENGINES)] = "auto"
    device: Annotated[str, one_of(*DEVICES)] = "auto"
    dtype: Annotated[str, one_of(*DTYPES)] = "auto"
    adapter_chat_templates: Annotated[bool, yes_or_no] = True
    refresh_interval_s: Annotated[float, positive] = 5.0
    routers: Annotated[int, whole(1)] = 1
    placement: PlacementArguments = field(default_factory=PlacementArguments)
    autoscaling: AutoscalingArguments = field(default_factory=AutoscalingArguments)
    start: StartArguments = field(default_factory=StartArguments)
    limits: LimitArguments = field(default_factory=LimitArguments)
    http: HttpArguments = field(default_factory=HttpArguments)
    vllm: VllmArguments = field(default_factory=VllmArguments)

    @property
    def inflight_of_a_router(self) -> int:
        """Sequences of one group."""
        return self.limits.max_inflight // self.routers

    @property
    def can_be_at_zero(self) -> bool:
        return self.autoscaling.max is not None and self.autoscaling.min == 0

    @property
    def replicas_planned(self) -> int:
        """Of each group: for so many there must be a device."""
        if self.autoscaling.max is None:
            return self.placement.replicas
        return self.autoscaling.min if self.autoscaling.share_devices else self.autoscaling.max


NESTED = {
    "placement": PlacementArguments,
    "autoscaling": AutoscalingArguments,
    "start": StartArguments,
    "limits": LimitArguments,
    "http": HttpArguments,
    "vllm": VllmArguments,
}


def parse_arguments(document: Mapping[str, Any]) -> Arguments:
    """Raises ConfigError naming the key, what was seen and what is expected. A null value means the default."""
    left = _flatten(document)
    placement = _take(PlacementArguments, "placement.", left)
    start = _take(StartArguments, "start.", left)
    autoscaling = _take(AutoscalingArguments, "autoscaling.", left)
    limits = _take(LimitArguments, "limits.", left)
    http = _take(HttpArguments, "http.", left)
    vllm = _take(VllmArguments, "vllm.", left)
    nested = {"placement": placement, "autoscaling": autoscaling, "start": start, "limits": limits, "http": http}
    arguments = _take(Arguments, "", left, **nested, vllm=vllm)
    if left:
        raise ConfigError(f"unknown argument {sorted(left)[0]!r}; known are {', '.join(known_keys())}")
    if limits.max_prompts > arguments.inflight_of_a_router:
        shared = f" shared by {arguments.routers} routers" if arguments.routers > 1 else ""
        raise ConfigError(
            f"limits.max_prompts is {limits.max_prompts}, more than limits.max_inflight {limits.max_inflight}{shared}: "
            "such a request could never be admitted; lower the first or raise the second"
        )
    if vllm.enable_auto_tool_choice and vllm.tool_call_parser is None:
        raise ConfigError("argument vllm.enable_auto_tool_choice is true, which needs vllm.tool_call_parser")
    _check_autoscaling(arguments)
    return arguments


def _check_autoscaling(arguments: Arguments) -> None:
    """Raises ConfigError for what contradicts itself."""
    scaling = arguments.autoscaling
    if scaling.max is None:
        if given := [field.name for field in fields(scaling) if getattr(scaling, field.name) != field.default]:
            raise ConfigError(f"argument autoscaling.{given[0]} needs autoscaling.max, which turns autoscaling on")
        return
    if scaling.min > scaling.max:
        raise ConfigError(f"autoscaling.min is {scaling.min}, more than autoscaling.max {scaling.max}")
    if (replicas := arguments.placement.replicas) != PlacementArguments.replicas:
        raise ConfigError(
            f"placement.replicas is {replicas}, a fixed number, beside autoscaling.max {scaling.max}; give one of them"
        )
    if scaling.at_zero != AutoscalingArguments.at_zero and scaling.min > 0:
        raise ConfigError(
            f"autoscaling.at_zero is {scaling.at_zero}, and no group goes to zero with autoscaling.min {scaling.min}; "
            "leave it out, or give autoscaling.min=0"
        )


def known_keys() -> list[str]:
    """Every key in its flat form."""
    return [*_parsers(Arguments), *(f"{group}.{name}" for group, kind in NESTED.items() for name in _parsers(kind))]


def _parsers(kind: type) -> dict[str, Parser]:
    """Field -> its parser, which stands in the field's annotation."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _flatten(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        group = key in NESTED
        if group and not isinstance(value, Mapping) and value is not None:
            raise ConfigError(f"argument {key} is {value!r}, expected a mapping, or {key}.<option>=<value>")
        items = {f"{key}.{name}": option for name, option in (value or {}).items()} if group else {key: value}
        for name, option in items.items():
            if name in flat:
                raise ConfigError(f"argument {name} is given twice, nested and flat; give it once")
            flat[name] = option
    return flat


def _take(kind: type[T], prefix: str, left: dict[str, Any], **values: Any) -> T:
    """Move the options of ``kind`` out of ``left``."""
    for name, parse in _parsers(kind).items():
        value = left.pop(prefix + name, None)
        if value is not None:
            try:
                values[name] = parse(value)
            except ValueError as error:
                raise ConfigError(f"argument {prefix}{name} is {value!r}, expected {error}") from None
        elif not hasattr(kind, name):
            raise ConfigError(f"argument {name} is missing; give {name}=..., known are {', '.join(known_keys())}")
    return kind(**values)
