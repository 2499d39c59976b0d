"""A call's body as one of vLLM's own requests: unknown fields are refused, which vLLM ignores, and so is what a client
could harm others with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest

from serve_app.openai.call import Call, read_object
from serve_app.openai.errors import invalid
from serve_app.openai.requests import (
    MOST_BIASED,
    MOST_STOP_CHARACTERS,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    NEUTRAL,
    SAYS_NOTHING,
    check_says_nothing,
    is_neutral,
    unknown_field,
)
from serve_app.openai.schema_bounds import check_schema

# vLLM knows them; here they would reach another's cache, another process, or a template of the client's own.
REFUSED = (
    "cache_salt", "chat_template", "ec_transfer_params", "kv_transfer_params", "prompt_embeds", "request_id",
    "session_id", "vllm_xargs",
)  # fmt: skip
# Of images, of endpoints or of settings that are not here: vLLM ignores them.
_OF_NOTHING_HERE = (
    "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "priority", "return_mm_kwargs", "return_token_offsets",
    "routed_experts_prompt_start", "watermarking",
)  # fmt: skip
# What a renderer takes by these names is no variable of a template, but another template, or how to render.
_NO_VARIABLES = ("chat_template", "tokenize", "messages", "conversation", "return_dict")
# Beyond these vLLM's sampler on a GPU raises in its step, which ends the engine.
_MOST_ENTRIES = {"logit_bias": MOST_BIASED, "allowed_token_ids": 1024, "stop_token_ids": MOST_STOP_TOKENS}
_MOST_BAD_CHARACTERS = 1024
_VLLMS_STOPS = 4  # that its request takes, as OpenAI's does; its engine takes more
# What its beam search drops without a word.
_NOT_WITH_BEAMS = (
    "allowed_token_ids", "bad_words", "frequency_penalty", "logit_bias", "min_tokens", "presence_penalty",
    "repetition_penalty", "response_format", "seed", "stop", "stop_token_ids", "structured_outputs", "top_k", "top_p",
)  # fmt: skip
_NULL_ELSEWHERE = ("best_of", "max_completion_tokens", "messages")  # not in every request of vLLM's
_STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
_ASKED = {"chat": "messages", "completions": "prompt", "tokenize": "prompt", "detokenize": "tokens"}


def make_request(call: Call, base_name: str, vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """vLLM's request, and the fields it was made of, the model as the client called it. Raises ApiError."""
    given = read_object(call.body)
    kind = _kind(call, given)
    fields = _fields(call, kind, given)
    asked = "messages" if kind is TokenizeChatRequest else _ASKED[call.endpoint]
    if asked not in fields:
        raise invalid(f"{asked} is missing", asked, "missing_field")
    if fields[asked] == []:
        raise invalid(f"{asked} is empty", asked, "invalid_value")
    _check_bounds(fields, vocab_size)
    if call.endpoint == "completions" and fields.get("logprobs") is False:
        del fields["logprobs"]  # which would count as 0
    for message in fields.get("messages") or ():
        if isinstance(message, dict) and message.get("role") == "developer":
            message["role"] = "system"
    if "request_id" in kind.model_fields:
        fields["request_id"] = call.answer_id.partition("-")[2]
    stops = fields.get("stop")
    if isinstance(stops, list):
        fields["stop"] = stops[:_VLLMS_STOPS] + [stop for stop in stops[_VLLMS_STOPS:] if not isinstance(stop, str)]
    served = base_name if call.adapter is None else f"{call.adapter}#{call.revision}"
    request = _validated(kind, fields | {"model": served})
    if isinstance(stops, list):
        request.stop = stops
    return request, fields


def _kind(call: Call, given: Mapping[str, Any]) -> Any:
    if call.endpoint == "tokenize":
        return TokenizeChatRequest if given.get("messages") is not None else TokenizeCompletionRequest
    kinds = {"completions": CompletionRequest, "chat": ChatCompletionRequest, "detokenize": DetokenizeRequest}
    return kinds[call.endpoint]


def _fields(call: Call, kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if value is None and (name in kind.model_fields or name in NEUTRAL or name in _NULL_ELSEWHERE):
            continue
        if name in SAYS_NOTHING:
            check_says_nothing(name, value)
            continue
        if name in REFUSED or (name in _OF_NOTHING_HERE and not is_neutral(name, value)):
            raise invalid(f"{name} is not taken from clients here; leave it out", name, "unsupported_value")
        if name in kind.model_fields:
            fields[name] = value
        elif name == "max_completion_tokens" and call.endpoint == "completions":  # load generators send both to both
            if given.get("max_tokens") not in (None, value):
                raise invalid(f"{name} is {value} and max_tokens {given['max_tokens']}; give one of them", name)
            fields["max_tokens"] = value
        elif name == "best_of":
            if value != (given.get("n") or 1):
                raise invalid("best_of is not n: no choice is left out here; leave it out", name, "invalid_value")
        elif not is_neutral(name, value):
            raise unknown_field(name)
    return fields


def _check_bounds(fields: Mapping[str, Any], vocab_size: int) -> None:
    """What vLLM would take otherwise than the router has counted it, or at the price of the engine."""

    def need(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise invalid(f"{name}: expected {expected}", name, "invalid_value")

    need(type(fields.get("n", 1)) is int, "n", "a whole number")
    need(isinstance(fields.get("stream", False), bool), "stream", "true or false")
    for name, most in _MOST_ENTRIES.items():
        value = fields.get(name, ())
        need(not isinstance(value, (list, dict)) or len(value) <= most, name, f"at most {most} of them")
    words = fields.get("bad_words", ())
    size = sum(map(len, filter(lambda word: isinstance(word, str), words))) if isinstance(words, list) else 0
    need(size <= _MOST_BAD_CHARACTERS, "bad_words", f"at most {_MOST_BAD_CHARACTERS} characters together")
    stops = fields.get("stop")
    texts = [stop for stop in (stops if isinstance(stops, list) else [stops]) if isinstance(stop, str)]
    told = f"at most {MOST_STOPS} with {MOST_STOP_CHARACTERS} characters together"
    need(len(texts) <= MOST_STOPS and sum(map(len, texts)) <= MOST_STOP_CHARACTERS, "stop", told)
    for name in ("response_format", "structured_outputs", "tools"):
        check_schema(fields.get(name), name)
    if fields.get("use_beam_search"):
        dropped = [name for name in _NOT_WITH_BEAMS if name in fields]
        need(not dropped, dropped[0] if dropped else "", "nothing with use_beam_search, which takes no notice of it")
    options = fields.get("stream_options")
    unknown = [key for key in options if key not in _STREAM_OPTIONS] if isinstance(options, dict) else []
    need(not unknown, "stream_options", f"{', '.join(_STREAM_OPTIONS)}, not {', '.join(unknown)[:100]}")
    variables = fields.get("chat_template_kwargs", {})
    strange = [key for key in _NO_VARIABLES if isinstance(variables, dict) and key in variables]
    need(not strange, "chat_template_kwargs", f"variables of the template, which {' '.join(strange)} is not")
    prompt: Any = fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], list) else [prompt]
    for name, lists in (("prompt", prompts), ("tokens", [fields.get("tokens")])):
        for tokens in lists:
            if not isinstance(tokens, list) or (tokens is prompt and all(isinstance(text, str) for text in tokens)):
                continue
            fine = all(type(token) is int and 0 <= token < vocab_size for token in tokens)
            need(fine, name, f"token ids, whole numbers below {vocab_size}")


def _validated(kind: Any, fields: Mapping[str, Any]) -> Any:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        raise invalid(f"{name or 'the body'}: {first['msg']}", name, "invalid_value") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        # vLLM's validators look into fields before they know of what kind they are.
        raise invalid(f"a field is not of the kind it should be ({type(error).__name__}: {error})") from None
