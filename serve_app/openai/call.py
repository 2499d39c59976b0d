"""A request on its way to who answers it: what the router reads of its body, and what crosses to a replica and back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from serve_app.openai.errors import ApiError, invalid

Endpoint = Literal["completions", "chat", "tokenize", "detokenize"]


@dataclass(frozen=True)
class Envelope:
    """What it takes to route, to admit and to count. ``user``: the client's own, "" where it names none."""

    model: str
    stream: bool
    num_prompts: int
    n: int
    user: str = ""

    @property
    def num_sequences(self) -> int:
        return self.num_prompts * self.n


@dataclass(frozen=True)
class Call:
    """``adapter`` None is the base; ``served`` is the revision that the router's map has of it, and that map is of the
    bundle's ``revision``. ``router`` asks, for ``num_sequences``."""

    endpoint: Endpoint
    body: bytes
    answer_id: str
    adapter: str | None
    served: str
    revision: int
    router: str = ""
    num_sequences: int = 1


@dataclass(frozen=True)
class Reply:
    """A whole answer, or an error: JSON."""

    status: int
    body: bytes


@dataclass(frozen=True)
class Carried:
    """The first piece of a stream whose others come by the carrier that ``replica`` has open to the router."""

    piece: bytes
    replica: str


Message = list[tuple[str, Reply | bytes | None]]
"""By a carrier: answer id, and a piece of it; None: its end. The first one has the replica's name, for no answer."""


def read_object(body: bytes) -> dict[str, Any]:
    """Raises ApiError (400) where the body is no JSON object; half a surrogate pair is no JSON here."""
    try:
        document = from_json(body)
    except ValueError as error:
        raise invalid(f"The body is not JSON ({error})", code="invalid_json") from None
    if not isinstance(document, dict):
        raise invalid(f"The body is a JSON {type(document).__name__}, expected an object", code="invalid_json")
    for name, value in document.items():
        if not _fits(value):
            raise invalid(f"{name} holds a whole number beyond 64 bits", name, "invalid_value")
    return document


def _fits(value: Any) -> bool:
    """Whether its whole numbers are of 64 bits: what takes them further on knows no others."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, list):
        return all(map(_fits, value))
    return all(map(_fits, value.values())) if isinstance(value, dict) else True


def read_envelope(body: bytes) -> Envelope:
    """Raises ApiError (400) where there is no object, or no model in it. What else is wrong is for who answers to say:
    it counts here as if it were not there."""
    document = read_object(body)
    if (model := document.get("model")) is None:
        raise invalid("model is missing", "model", "missing_field")
    if not isinstance(model, str):
        raise invalid(f"model is {json.dumps(model)[:100]}: expected a string", "model", "invalid_value")
    prompt, n, user = document.get("prompt"), document.get("n"), document.get("user")
    num_prompts = len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)) else 1
    num_choices = n if type(n) is int and n > 0 else 1
    return Envelope(
        model, document.get("stream") is True, num_prompts, num_choices, user if isinstance(user, str) else ""
    )


def error_reply(error: ApiError) -> Reply:
    # All of it ASCII: what a client sent and is told may hold half a surrogate pair.
    return Reply(error.status, json.dumps(error.body).encode())
