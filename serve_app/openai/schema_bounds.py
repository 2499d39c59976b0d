"""How large a client's schema may be. Whoever compiles one takes memory and time by its numbers and its size: a
minItems of 2^40 would end the process, a thousand properties would hold it for seconds."""

from __future__ import annotations

import json
from typing import Any

from serve_app.openai.errors import invalid

MOST_SCHEMA_BYTES, MOST_PROPERTIES = 64 << 10, 500
_MOST_NUMBERS = {
    **dict.fromkeys(("minItems", "maxItems", "minContains", "maxContains", "minProperties", "maxProperties"), 1000),
    **dict.fromkeys(("minLength", "maxLength"), 100_000),
}


def check_schema(value: Any, name: str) -> None:
    """Of a field that holds a schema somewhere, as JSON or as text. Raises ApiError (400) beyond a bound."""
    if len(json.dumps(value)) > MOST_SCHEMA_BYTES:
        raise invalid(f"{name} has more than {MOST_SCHEMA_BYTES} bytes", name, "invalid_value")
    _check(value, name)


def _check(value: Any, name: str) -> None:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return
        except RecursionError:
            raise invalid(f"{name} is nested too deeply", name, "invalid_value") from None
    if isinstance(value, list):
        for item in value:
            _check(item, name)
    if not isinstance(value, dict):
        return
    for key, own in value.items():
        most = _MOST_NUMBERS.get(key)
        if most is not None and isinstance(own, (int, float)) and own > most:
            raise invalid(f"{name}: {key} is {own}, expected at most {most}", name, "invalid_value")
        if key in ("properties", "$defs", "definitions") and isinstance(own, dict) and len(own) > MOST_PROPERTIES:
            raise invalid(f"{name}: {len(own)} {key}, expected at most {MOST_PROPERTIES}", name, "invalid_value")
        _check(own, name)
