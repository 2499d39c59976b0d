"""A client's schema is let in up to its bounds, wherever it stands, and refused by name beyond."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.openai.errors import ApiError
from serve_app.openai.schema_bounds import MOST_PROPERTIES, check_schema


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 1000, "maxItems": 1000},
        {"type": "string", "maxLength": 100_000},
        properties(MOST_PROPERTIES),
        {"properties": {"minItems": {"type": "integer"}}},
        "root ::= 'x'",
        "{ is no JSON",
        None,
    ],
    ids=str,
)
def test_what_is_within_the_bounds_is_let_in(schema: Any) -> None:
    check_schema(schema, "response_format")


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "array", "minItems": 2**40}, "minItems is 1099511627776, expected at most 1000"),
        ({"anyOf": [{"items": {"maxItems": 1e12}}]}, "maxItems"),
        ({"type": "string", "minLength": 10**9}, "minLength"),
        ({"$defs": properties(MOST_PROPERTIES + 1)}, "501 properties"),
        ({"description": "x" * 70_000}, "more than 65536 bytes"),
        ({"json": json.dumps({"minItems": 10**6})}, "minItems"),
        ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "nested too deeply"),
        ([{"function": {"parameters": {"minProperties": 5000}}}], "minProperties"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_beyond_is_named(schema: Any, told: str) -> None:
    with pytest.raises(ApiError, match=told) as caught:
        check_schema(schema, "tools")
    assert (caught.value.status, caught.value.param) == (400, "tools")
