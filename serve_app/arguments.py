"""The application's arguments: what ``serve run serve_app.app:build key=value`` and a Serve config file may say.

A command line hands over flat strings (``limits.max_batch=16``), a config file nested YAML
(``limits: {max_batch: 16}``). Both end in the same frozen ``Arguments``; a key that is not known, or a value
that is not what the key expects, is a ConfigError that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from cluster.errors import ConfigError
from cluster.units import parse_size

ENGINES = ("auto", "transformers", "vllm")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")

# What Serve sends from a router to a replica is one message, of 4 MiB at most.
MOST_BODY_BYTES = 3 << 20

Auto = Literal["auto"]
Parser = Callable[[Any], Any]
T = TypeVar("T")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value.strip()


def _one_of(*names: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError("one of " + ", ".join(names))
        return str(value)

    return parse


def _whole(minimum: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\d+", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"a whole number of at least {minimum}")
        return value

    return parse


def _yes_or_no(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _positive(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError("a number above 0")
    return number


def _origins(value: Any) -> tuple[str, ...]:
    """A list, or its items with commas between them, as a command line has it."""
    items = value.split(",") if isinstance(value, str) else value
    expected = "origins such as https://app.example.org, a list or with commas between them, or *"
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError(expected)
    origins = tuple(item.strip() for item in items)
    if not all(re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin) for origin in origins):
        raise ValueError(expected)
    return origins


def _size(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError("a size such as 80GiB, or a number of bytes")
    return parse_size(str(value))


def _at_most(most: int, parse: Parser) -> Parser:
    def parse_bounded(value: Any) -> Any:
        number = parse(value)
        if not 0 < number <= most:
            raise ValueError(f"above 0 and at most {most}")
        return number

    return parse_bounded


def _auto_or(parse: Parser) -> Parser:
    def parse_or_auto(value: Any) -> Any:
        if value == "auto":
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return parse_or_auto


@dataclass(frozen=True)
class PlacementArguments:
    """How the bundle's clusters are laid over groups, and what each replica asks of the Ray cluster.

    ``devices`` is how many replicas can be held (GPUs, or machines on CPU), ``replicas`` and ``num_cpus``
    are of each group, ``device_memory`` is bytes of one device.
    """

    clusters_per_group: Annotated[int | Auto, _auto_or(_whole(1))] = "auto"
    devices: Annotated[int | Auto, _auto_or(_whole(1))] = "auto"
    replicas: Annotated[int, _whole(1)] = 1
    num_cpus: Annotated[float, _positive] = 1.0
    device_memory: Annotated[int | Auto, _auto_or(_size)] = "auto"


@dataclass(frozen=True)
class LimitArguments:
    """``max_batch`` sequences of at most ``max_model_len`` tokens run together in a replica; ``max_inflight``
    sequences of a group may run or wait before the router answers 429; a request for more than ``max_prompts``
    sequences is refused, and so is a body above ``max_body`` bytes; one that takes longer than ``request_timeout_s`` is
    given up (504)."""

    max_batch: Annotated[int, _whole(1)] = 32
    max_model_len: Annotated[int, _whole(2)] = 2048
    max_inflight: Annotated[int, _whole(1)] = 256
    max_prompts: Annotated[int, _whole(1)] = 64
    max_body: Annotated[int, _at_most(MOST_BODY_BYTES, _size)] = MOST_BODY_BYTES
    request_timeout_s: Annotated[float, _positive] = 300.0


@dataclass(frozen=True)
class HttpArguments:
    """A body that is not there after ``receive_timeout_s`` is a 408. A stream that waits for its first token gets a
    comment every ``sse_keep_alive_s`` seconds, so that nothing on the way thinks it dead. ``allowed_origins``: whose
    pages a browser lets read answers (CORS)."""

    receive_timeout_s: Annotated[float, _positive] = 30.0
    sse_keep_alive_s: Annotated[float, _positive] = 15.0
    allowed_origins: Annotated[tuple[str, ...], _origins] = ()


@dataclass(frozen=True)
class Arguments:
    """``bundle`` is ``<out>`` or ``<out>/bundles/<id>``; ``base`` a local folder, an ``s3://`` prefix or a hub id.
    ``adapter_chat_templates``: chats of an adapter that brought a template go through that, else through the base's.
    ``routers`` share what a group admits: each has its part of ``limits.max_inflight``."""

    bundle: Annotated[str, _text]
    base: Annotated[str, _text]
    revision: Annotated[int | None, _whole(0)] = None
    engine: Annotated[str, _one_of(*ENGINES)] = "auto"
    device: Annotated[str, _one_of(*DEVICES)] = "auto"
    dtype: Annotated[str, _one_of(*DTYPES)] = "auto"
    adapter_chat_templates: Annotated[bool, _yes_or_no] = True
    routers: Annotated[int, _whole(1)] = 1
    placement: PlacementArguments = field(default_factory=PlacementArguments)
    limits: LimitArguments = field(default_factory=LimitArguments)
    http: HttpArguments = field(default_factory=HttpArguments)

    @property
    def inflight_of_a_router(self) -> int:
        """Sequences of one group."""
        return self.limits.max_inflight // self.routers


def parse_arguments(document: Mapping[str, Any]) -> Arguments:
    """Raises ConfigError naming the key, what was seen and what is expected. A null value means the default."""
    left = _flatten(document)
    placement = _take(PlacementArguments, "placement.", left)
    limits = _take(LimitArguments, "limits.", left)
    http = _take(HttpArguments, "http.", left)
    arguments = _take(Arguments, "", left, placement=placement, limits=limits, http=http)
    if left:
        raise ConfigError(f"unknown argument {sorted(left)[0]!r}; known are {', '.join(known_keys())}")
    if limits.max_prompts > arguments.inflight_of_a_router:
        shared = f" shared by {arguments.routers} routers" if arguments.routers > 1 else ""
        raise ConfigError(
            f"limits.max_prompts is {limits.max_prompts}, more than limits.max_inflight {limits.max_inflight}{shared}: "
            "such a request could never be admitted; lower the first or raise the second"
        )
    return arguments


def known_keys() -> list[str]:
    """Every key in its flat form."""
    nested = {"placement": PlacementArguments, "limits": LimitArguments, "http": HttpArguments}
    return [*_parsers(Arguments), *(f"{group}.{name}" for group, kind in nested.items() for name in _parsers(kind))]


def _parsers(kind: type) -> dict[str, Parser]:
    """Field -> its parser, which stands in the field's annotation."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if hasattr(hint, "__metadata__")}


def _flatten(document: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in document.items():
        group = key in ("placement", "limits", "http")
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
