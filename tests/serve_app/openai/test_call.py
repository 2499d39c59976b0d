"""What the router reads of a body, and what it leaves to who answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.openai.call import Envelope, read_envelope
from serve_app.openai.errors import ApiError


def envelope(**fields: Any) -> Envelope:
    return read_envelope(json.dumps({"model": "m"} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "num_sequences"),
    [
        ({}, 1),
        ({"messages": [{"role": "user"}] * 3}, 1),
        ({"prompt": "a"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [[1], [2], [3]]}, 3),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"n": 10**12}, 10**12),
    ],
)
def test_sequences_are_prompts_times_n(fields: dict[str, Any], num_sequences: int) -> None:
    assert envelope(**fields).num_sequences == num_sequences


def test_the_user_is_read_in_the_same_pass_and_what_is_no_text_counts_as_nobody() -> None:
    assert envelope(user="üser").user == "üser"
    assert {envelope(user=other).user for other in (None, "", 3, ["a"], {})} == {""}


@pytest.mark.parametrize(
    "fields", [{"n": "3"}, {"n": True}, {"n": -1}, {"n": 2.5}, {"prompt": []}, {"prompt": {}}, {"stream": 1}]
)
def test_a_field_of_another_kind_counts_as_absent_and_is_refused_by_who_answers(fields: dict[str, Any]) -> None:
    assert envelope(**fields) == Envelope("m", False, 1, 1)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"", None, "invalid_json"),
        (b"[]", None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (b'{"model": "m", "stop": "\\ud800"}', None, "invalid_json"),
        (b"{}", "model", "missing_field"),
        (b'{"model": null}', "model", "missing_field"),
        (b'{"model": 3}', "model", "invalid_value"),
        (b'{"model": "m", "n": ' + b"9" * 4000 + b"}", "n", "invalid_value"),
        (b'{"model": "m", "x": [{"y": 9223372036854775808}]}', "x", "invalid_value"),
    ],
)
def test_what_names_no_model_is_a_400(body: bytes, param: str | None, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_envelope(body)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
