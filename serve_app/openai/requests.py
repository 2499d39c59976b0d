"""Requests of the OpenAI API, as far as they are honoured here.

A field is honoured, or accepted where it asks for nothing (``NEUTRAL``; null is neutral for all of them, real clients
and load generators send such fields) or where no text could follow from it (``SAYS_NOTHING``), or refused with a 400
that names it. Never ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from serve_app.engine.protocol import GenerationRequest
from serve_app.openai.call import read_object
from serve_app.openai.errors import ApiError, invalid
from serve_app.openai.schema_bounds import check_schema

# What vLLM's sampler has room for on a GPU; one more would end the engine.
MOST_BIASED, MOST_STOP_TOKENS = 1024, 64
# Each is looked for at each token, in the process that answers everybody.
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 4096
MAX_LOGPROBS = 20  # OpenAI's limit of chats, and vLLM's
COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; a chat goes on to the context's end

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "suffix": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    # vLLM
    "echo": (False,),  # of chats; completions have it
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "logits_processors": ([],),
    "priority": (0,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": (),
    "ec_transfer_params": (),
    "cache_salt": (),
    "request_id": (),
    "session_id": (),
    "prompt_embeds": (),
    "vllm_xargs": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "mm_payload": ("tensors",),
    "return_mm_kwargs": (True,),
    "return_token_offsets": (False,),
    "return_prompt_text": (False,),
    "routed_experts_prompt_start": (0,),
    "add_special_tokens": (),
    "include_reasoning": (True, False),
    "logprob_token_ids": (),
    "repetition_detection": (),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "truncation_side": ("left", "right"),
    "watermarking": (False,),
}
"""Field -> its values, besides null, that ask for nothing this server does not do anyway."""
SAYS_NOTHING: dict[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "prompt_cache_options": dict,
    "service_tier": str,
    "metadata": dict,
    "store": bool,
}
"""Field -> the kind of its values. It is about accounts, caches or logs, and changes nothing of the text."""
# What agents play back of the answer before, at the values that it had there.
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "name": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
}

R = TypeVar("R", bound="GenerationFields")


class _Strict(BaseModel):
    # strict: "0.5" is no number and 1 is no boolean; an integer still is a float.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    """``include_obfuscation`` asks for padding against who listens in; no text depends on it, and none is sent."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class NamedSchema(_Strict):
    """``strict`` and ``description`` change nothing: an answer is always held to the schema."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @property
    def schema_text(self) -> str | None:
        """None where any text will do."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


class GenerationFields(_Strict):
    """What both endpoints honour."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    # OpenAI has this one for chats alone; load generators send both to both.
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int = Field(0, ge=0)
    ignore_eos: bool = False
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1)
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, gt=0, allow_inf_nan=False)
    # OpenAI's bounds.
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MOST_BIASED)] = {}
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=MOST_STOP_TOKENS)] = ()
    stop: tuple[str, ...] = ()
    n: int = Field(1, ge=1)
    # Of so many the best n are to be given: none is left out here, so that it can only be n.
    best_of: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    NULL_IS_DEFAULT: ClassVar[tuple[str, ...]] = (
        *("min_tokens", "ignore_eos", "temperature", "top_p", "stop", "stream", "max_tokens", "seed"),
        *("stream_options", "max_completion_tokens", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "logit_bias", "stop_token_ids", "n", "best_of", "response_format"),
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_tuple(cls, value: Any) -> Any:
        stops = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
        if stops is None or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("expected a non-empty string, or a list of them")
        if len(stops) > MOST_STOPS or sum(map(len, stops)) > MOST_STOP_CHARACTERS:
            raise ValueError(f"expected at most {MOST_STOPS} with {MOST_STOP_CHARACTERS} characters together")
        return stops

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _list_as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("logit_bias")
    @classmethod
    def _by_token_id(cls, value: dict[str, float]) -> dict[str, float]:
        if strange := [token for token in value if not re.fullmatch("[0-9]{1,9}", token)]:
            raise ValueError(f"expected token ids as keys, not {strange[0][:100]!r}")
        return value

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        """In every chunk; as with vLLM, only where usage is asked for at all."""
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told_logprobs(self) -> int | None:
        """How many of the most probable tokens are told at each step; None: no log probabilities at all."""
        raise NotImplementedError

    def sampling(self) -> dict[str, Any]:
        """The fields of GenerationRequest that say how to generate."""
        return {
            "max_tokens": self.max_new_tokens,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "top_k": max(self.top_k, 0),
            "min_p": float(self.min_p),
            "presence_penalty": float(self.presence_penalty),
            "frequency_penalty": float(self.frequency_penalty),
            "repetition_penalty": float(self.repetition_penalty),
            "logit_bias": tuple((int(token), float(bias)) for token, bias in self.logit_bias.items()),
            "stop_token_ids": self.stop_token_ids,
            "logprobs": self.told_logprobs,
            "json_schema": self.response_format.schema_text if self.response_format else None,
            "stop": self.stop,
        }

    def seed_of(self, choice: int) -> int | None:
        """Choices of one prompt differ: the first has the request's seed, each next one the seed after."""
        if self.seed is None:
            return None
        return (self.seed + choice + 2**63) % 2**64 - 2**63

    def generations(self, answer_id: str, adapter: str | None) -> list[GenerationRequest]:
        """``n`` requests for the engine per prompt, in order."""
        raise NotImplementedError


class CompletionRequest(GenerationFields):
    """POST /v1/completions. ``prompt`` is parsed to a tuple of texts or of token tuples."""

    prompt: tuple[str | tuple[int, ...], ...]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    NULL_IS_DEFAULT: ClassVar[tuple[str, ...]] = (*GenerationFields.NULL_IS_DEFAULT, "echo", "logprobs")

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_none(cls, value: Any) -> Any:
        return None if value is False else value

    @property
    def told_logprobs(self) -> int | None:
        return self.logprobs

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompt_as_tuple(cls, value: Any) -> Any:
        def is_tokens(item: Any) -> bool:
            return isinstance(item, list) and bool(item) and all(type(token) is int and token >= 0 for token in item)

        if isinstance(value, str):
            return (value,)
        if is_tokens(value):
            return (tuple(value),)
        if isinstance(value, list) and value:
            if all(isinstance(item, str) for item in value):
                return tuple(value)
            if all(is_tokens(item) for item in value):
                return tuple(tuple(item) for item in value)
        raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists")

    @property
    def max_new_tokens(self) -> int | None:
        return super().max_new_tokens or max(COMPLETION_TOKENS, self.min_tokens)

    def generations(self, answer_id: str, adapter: str | None) -> list[GenerationRequest]:
        return [
            GenerationRequest(
                f"{answer_id}-{index * self.n + choice}",
                adapter,
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_token_ids=None if isinstance(prompt, str) else prompt,
                seed=self.seed_of(choice),
                echo=self.echo,
                **self.sampling(),
            )
            for index, prompt in enumerate(self.prompt)
            for choice in range(self.n)
        ]


class TextPart(_Strict):
    """``cache_control`` is about a cache that this server does not have."""

    type: Literal["text"]
    text: str
    cache_control: dict[str, Any] | None = None


class Message(_Strict):
    """Text parts are joined by line feeds. An assistant's turn may have said nothing; ``name`` goes into no prompt, as
    chat templates know none."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {n: v for n, v in value.items() if not (v is None or v in _NEUTRAL_IN_MESSAGES.get(n, ()))}
        if value.get("role") == "assistant":
            kept.setdefault("content", "")
        return kept

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if isinstance(value, list) and value:
            return "\n".join(TextPart.model_validate(part).text for part in value)
        if not isinstance(value, str):
            raise ValueError("expected a string or a list of text parts")
        return value

    @property
    def spoken_by(self) -> str:
        """OpenAI's newer name of the system role is no template's."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(GenerationFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    NULL_IS_DEFAULT: ClassVar[tuple[str, ...]] = (*GenerationFields.NULL_IS_DEFAULT, "logprobs", "top_logprobs")

    @property
    def told_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def generations(self, answer_id: str, adapter: str | None) -> list[GenerationRequest]:
        messages = tuple({"role": message.spoken_by, "content": message.content} for message in self.messages)
        return [
            GenerationRequest(
                f"{answer_id}-{choice}", adapter, messages=messages, seed=self.seed_of(choice), **self.sampling()
            )
            for choice in range(self.n)
        ]


def parse_request(kind: type[R], body: bytes) -> R:
    """Raises ApiError (400) naming the field that is wrong, unknown, or asks for what is not done here."""
    try:
        request = kind.model_validate(_without_neutral(kind, read_object(body)))
    except ValidationError as error:
        raise _from_validation(error) from None
    _check_together(request)
    return request


def _without_neutral(kind: type[GenerationFields], document: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in document.items():
        if name in kind.model_fields:
            if value is not None or name not in kind.NULL_IS_DEFAULT:
                kept[name] = value
        elif name in SAYS_NOTHING:
            check_says_nothing(name, value)
        elif name not in NEUTRAL:
            raise unknown_field(name)
        elif not is_neutral(name, value):
            allowed = ", ".join(json.dumps(neutral) for neutral in (*NEUTRAL[name], None))
            raise invalid(
                f"{name} is {json.dumps(value)[:100]}, which the transformers engine does not do (vllm may); leave it "
                f"out, or send {allowed}",
                name,
                "unsupported_value",
            )
    return kept


def check_says_nothing(name: str, value: Any) -> None:
    """Raises ApiError (400) where the value of a field in ``SAYS_NOTHING`` is not of its kind, and not null."""
    if value is not None and not isinstance(value, SAYS_NOTHING[name]):
        kind_of = {str: "a string", dict: "an object", bool: "true or false"}[SAYS_NOTHING[name]]
        raise invalid(f"{name} is {json.dumps(value)[:100]}, expected {kind_of}", name, "invalid_value")


def unknown_field(name: str) -> ApiError:
    name = name[:100]
    return invalid(f"Unknown field {name!r}: this server does not know what it asks for", name, "unknown_field")


def is_neutral(name: str, value: Any) -> bool:
    """Whether ``value`` asks for nothing in a field that is not honoured; False for a field that is not known."""
    return name in NEUTRAL and (value is None or any(_same(value, neutral) for neutral in NEUTRAL[name]))


def _same(value: Any, neutral: Any) -> bool:
    # JSON's 1 and true are equal in Python.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _from_validation(error: ValidationError) -> ApiError:
    """Of the first thing that is wrong, by its place."""
    first = error.errors(include_url=False, include_context=False)[0]
    # A union's branches add their own names to the place; only the request's own names mean something.
    parts = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return unknown_field(param)
    if first["type"] == "missing":
        return invalid(f"{param} is missing", param, "missing_field")
    return invalid(f"{param} is {json.dumps(first['input'], default=str)[:100]}: {message}", param, "invalid_value")


def _check_together(request: GenerationFields) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options is only allowed when stream is true", "stream_options")
    if len({request.max_tokens, request.max_completion_tokens} - {None}) > 1:
        raise invalid(
            f"max_completion_tokens is {request.max_completion_tokens} and max_tokens {request.max_tokens}; "
            "give one of them",
            "max_completion_tokens",
        )
    if request.best_of not in (None, request.n):
        raise invalid(
            f"best_of is {request.best_of} and n {request.n}: no choice is left out here; leave it out", "best_of"
        )
    if request.n > 1 and request.temperature == 0:
        raise invalid(f"n is {request.n} at temperature 0, where all choices would be the same; ask for one", "n")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        raise invalid("echo with logprobs: the transformers engine tells none of a prompt; engine=vllm does", "echo")
    wanted = request.response_format
    if wanted is not None and (wanted.type == "json_schema") != (wanted.json_schema is not None):
        raise invalid(
            "response_format has a json_schema where its type is json_schema, and only there", "response_format"
        )
    if wanted is not None and wanted.schema_text is not None:
        if request.min_tokens or request.ignore_eos:
            name = "min_tokens" if request.min_tokens else "ignore_eos"
            raise invalid(f"response_format ends an answer where it is whole: not with {name}", name)
        check_schema(wanted.model_dump(by_alias=True), "response_format")
    if request.max_new_tokens is not None and request.min_tokens > request.max_new_tokens:
        raise invalid(f"min_tokens is {request.min_tokens}, above max_tokens {request.max_new_tokens}", "min_tokens")
