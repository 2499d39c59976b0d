"""Answers held to a schema: whatever the model would say, what comes out is JSON that jsonschema accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from cluster.errors import RequestError
from serve_app.engine.transformers.grammar import Grammars

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(base_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_path)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, [tokenizer.eos_token_id])


@pytest.mark.parametrize("seed", range(8))
def test_a_model_of_noise_says_what_the_schema_allows_and_ends(grammars: Grammars, tokenizer: Any, seed: int) -> None:
    grammar, said = grammars.make(json.dumps(PERSON)), list[int]()
    generator = torch.Generator().manual_seed(seed)
    while not grammar.is_over:
        logits = torch.randn(len(tokenizer) + 64, generator=generator)
        grammar.restrict(logits)
        token = int(logits.argmax())
        if token == tokenizer.eos_token_id:
            break
        grammar.accept(token)
        said.append(token)
        assert len(said) < 200
    jsonschema.validate(json.loads(tokenizer.decode(said)), PERSON)


def test_rows_beyond_the_tokenizers_words_are_never_drawn(grammars: Grammars, tokenizer: Any) -> None:
    logits = torch.zeros(len(tokenizer) + 64)
    grammars.make('{"type": "object"}').restrict(logits)
    assert logits[len(tokenizer) :].isneginf().all()
    assert logits.isfinite().any()


def test_two_answers_of_one_schema_do_not_touch_each_other(grammars: Grammars, tokenizer: Any) -> None:
    first, second = grammars.make('{"type": "boolean"}'), grammars.make('{"type": "boolean"}')
    [true] = tokenizer("true")["input_ids"]
    first.accept(true)
    assert (first.is_over, second.is_over) == (True, False)
    with pytest.raises(RequestError, match="cannot be followed"):
        second.accept(tokenizer("no")["input_ids"][0])


@pytest.mark.parametrize(
    "schema",
    [{"type": 5}, {"type": "string", "pattern": "("}, {"$ref": "http://127.0.0.1:1/x"}, {"allOf": "x"}, []],
    ids=str,
)
def test_a_schema_that_cannot_be_used_is_the_clients_fault(grammars: Grammars, schema: Any) -> None:
    with pytest.raises(RequestError, match="the schema cannot be used") as caught:
        grammars.make(json.dumps(schema))
    assert caught.value.param == "response_format"
