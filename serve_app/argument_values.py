"""What values of arguments may be, as a command line or a config file has them: each parser raises ValueError with what
it expects."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from cluster.units import parse_size

Parser = Callable[[Any], Any]


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a non-empty string")
    return value.strip()


def one_of(*names: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError("one of " + ", ".join(names))
        return str(value)

    return parse


def whole(minimum: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"\d+", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"a whole number of at least {minimum}")
        return value

    return parse


def yes_or_no(value: Any) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def positive(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError("a number above 0")
    return number


def from_0(value: Any) -> float:
    try:
        return 0.0 if not isinstance(value, bool) and float(value) == 0 else positive(value)
    except (TypeError, ValueError):
        raise ValueError("a number from 0 on") from None


def part(value: Any) -> float:
    try:
        number = from_0(value)
    except ValueError:
        number = math.inf
    if number > 1:
        raise ValueError("a number from 0 to 1")
    return number


def percent(value: Any) -> int:
    try:
        number: int = whole(0)(value)
    except ValueError:
        number = 101
    if number > 100:
        raise ValueError("a whole number from 0 to 100")
    return number


def at_least(least: float, parse: Parser) -> Parser:
    def parse_bounded(value: Any) -> Any:
        number = parse(value)
        if number < least:
            raise ValueError(f"a number of at least {least:g}")
        return number

    return parse_bounded


def origins(value: Any) -> tuple[str, ...]:
    """A list, or its items with commas between them, as a command line has it."""
    items = value.split(",") if isinstance(value, str) else value
    expected = "origins such as https://app.example.org, a list or with commas between them, or *"
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise ValueError(expected)
    origins = tuple(item.strip() for item in items)
    if not all(re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin) for origin in origins):
        raise ValueError(expected)
    return origins


def size(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError("a size such as 80GiB, or a number of bytes")
    return parse_size(str(value))


def at_most(most: int, parse: Parser) -> Parser:
    def parse_bounded(value: Any) -> Any:
        number = parse(value)
        if not 0 < number <= most:
            raise ValueError(f"above 0 and at most {most}")
        return number

    return parse_bounded


def auto_or(parse: Parser) -> Parser:
    def parse_or_auto(value: Any) -> Any:
        if value == "auto":
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise ValueError(f"auto, or {error}") from None

    return parse_or_auto
