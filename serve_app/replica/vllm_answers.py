"""Answers of a replica with the vLLM engine, made by vLLM's own serving classes: what its server honours is honoured.

    body -> checked here -> vLLM's request -> vLLM's chat or completions, on the engine that this replica owns -> JSON

An adapter's name means what the serving map says. Unknown fields are refused, which vLLM ignores; what a client could
harm others with is refused too. vLLM's names are checked in ``serve_app/engine/vllm/plugin/compatibility.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import CtsError
from serve_app.engine.vllm.engine import VllmEngine
from serve_app.openai.call import Call, Endpoint, Reply, error_reply, read_object
from serve_app.openai.errors import ApiError, as_api_error, internal_error, invalid, unavailable
from serve_app.openai.requests import (
    MOST_BIASED,
    MOST_STOP_TOKENS,
    NEUTRAL,
    SAYS_NOTHING,
    check_says_nothing,
    is_neutral,
    unknown_field,
)
from serve_app.replica.answering import merge

logger = logging.getLogger("ray.serve")

_KINDS: dict[Endpoint, type[Any]] = {"completions": CompletionRequest, "chat": ChatCompletionRequest}
# vLLM knows them; here they would reach another's cache, another process, or a template of the client's own.
_REFUSED = (
    "cache_salt", "chat_template", "ec_transfer_params", "kv_transfer_params", "mm_processor_kwargs", "prompt_embeds",
    "request_id", "session_id", "vllm_xargs",
)  # fmt: skip
# What a renderer takes by these names is no variable of a template, but another template, or how to render.
_NO_VARIABLES = ("chat_template", "tokenize", "messages", "conversation", "return_dict")
# Where an adapter's own template speaks, which is given the messages alone.
_NOT_GIVEN = ("tools", "documents", "chat_template_kwargs", "reasoning_effort", "continue_final_message")
# Beyond these vLLM's sampler on a GPU raises in its step, which ends the engine.
_MOST_ENTRIES = {"logit_bias": MOST_BIASED, "allowed_token_ids": 1024, "stop_token_ids": MOST_STOP_TOKENS}
_MOST_BAD_CHARACTERS = 1024
# A template that says nothing but what an adapter's own has said: it ran in a process of its own.
_SPOKEN = "{{ cts_spoken }}"
_MOST_STOPS = 4  # that vLLM takes, as OpenAI does; its engine takes any number
_ERROR = 'data: {"error"'


class VllmAnswers:
    """Implements ``serve_app.replica.answering.Answers``. The engine has started."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine, self._map, llm = engine, engine.serving_map, engine.llm
        models = _Models(llm, [BaseModelPath(self._map.base_name, self._map.base_name)])
        models.lora_requests = _LoraRequests(engine)
        template: dict[str, Any] = {
            "request_logger": None,
            "chat_template": None,
            "chat_template_content_format": "auto",
            "trust_request_chat_template": True,  # ours alone: a client's is refused
        }
        renderer = OnlineRenderer(llm.model_config, llm.renderer, **template)
        self._serving: dict[str, Any] = {
            "chat": OpenAIServingChat(llm, models, "assistant", online_renderer=renderer, **template),
            "completions": OpenAIServingCompletion(llm, models, online_renderer=renderer, request_logger=None),
        }
        for serving in self._serving.values():
            serving.system_fingerprint = None  # vLLM's own; here it is the served revision

    async def answer(self, call: Call) -> Reply:
        try:
            async with self._engine.holding(self._served(call)):
                result = await self._create(call)
                result.system_fingerprint = call.served
                return Reply(200, result.model_dump_json().encode())
        except Exception as error:
            return self._refusal(call, error)

    async def stream(self, call: Call) -> AsyncGenerator[Reply | bytes, None]:
        try:
            async with (
                self._engine.holding(self._served(call)),
                aclosing(merge([await self._create(call)])) as batches,
            ):
                begun = False
                async for batch in batches:
                    texts = [text for _, text in batch]
                    good = list(itertools.takewhile(lambda text: not text.startswith(_ERROR), texts))
                    if len(good) < len(texts):
                        told = error_reply(self._told(texts[len(good)]))
                        yield "".join(good).encode() + b"data: " + told.body + b"\n\n" if begun or good else told
                        return
                    begun = True
                    yield "".join(good).encode()
        except Exception as error:
            yield self._refusal(call, error)

    def _served(self, call: Call) -> ServedAdapter | None:
        return None if call.adapter is None else self._map.find(call.adapter)

    async def _create(self, call: Call) -> Any:
        """vLLM's whole answer, or its generator of events. Raises ApiError, and whatever vLLM raises."""
        document = self._checked(call)
        stops = document.get("stop")
        if isinstance(stops, list):
            document["stop"] = stops[:_MOST_STOPS] + [stop for stop in stops[_MOST_STOPS:] if not isinstance(stop, str)]
        request = _validated(_KINDS[call.endpoint], document)
        if isinstance(stops, list):
            request.stop = stops
        special = self._engine.special_stops([stops] if isinstance(stops, str) else stops or ())
        if special and request.skip_special_tokens:
            request.stop_token_ids = [*(request.stop_token_ids or ()), *special]
        served = self._served(call)
        if call.endpoint == "chat" and served is not None and served.chat_template is not None:
            text = await asyncio.to_thread(self._speak, served.chat_template, document)
            request.chat_template, request.chat_template_kwargs = _SPOKEN, {"cts_spoken": text}
        serving = self._serving[call.endpoint]
        create = serving.create_chat_completion if call.endpoint == "chat" else serving.create_completion
        result = await create(request)
        if isinstance(result, ErrorResponse):
            raise _api_error(result)
        return result

    def _checked(self, call: Call) -> dict[str, Any]:
        """The fields for vLLM's request. Raises ApiError."""
        kind, document = _KINDS[call.endpoint], {}
        for name, value in read_object(call.body).items():
            if name in SAYS_NOTHING:
                check_says_nothing(name, value)
                continue
            if value is None and (name in kind.model_fields or name in NEUTRAL):
                continue
            if name in _REFUSED:
                raise invalid(f"{name} is not taken from clients here; leave it out", name, "unsupported_value")
            if name in kind.model_fields:
                document[name] = value
            elif name == "max_completion_tokens":  # of chats; load generators send both to both
                if document.setdefault("max_tokens", value) != value:
                    raise invalid(f"{name} is {value} and max_tokens {document['max_tokens']}; give one of them", name)
            elif name == "best_of":
                if value != document.get("n", 1):
                    raise invalid("best_of is not n: no choice is left out here; leave it out", name, "invalid_value")
            elif not is_neutral(name, value):
                raise unknown_field(name)
        asked = "messages" if call.endpoint == "chat" else "prompt"
        if asked not in document:
            raise invalid(f"{asked} is missing", asked, "missing_field")
        if document[asked] == []:
            raise invalid(f"{asked} is empty", asked, "invalid_value")
        self._check_bounds(document)
        if call.endpoint == "completions" and document.get("logprobs") is False:
            del document["logprobs"]  # which would count as 0
        for message in document.get("messages") or ():
            if isinstance(message, dict) and message.get("role") == "developer":
                message["role"] = "system"
        number = call.answer_id.partition("-")[2]
        return document | {"model": call.adapter or self._map.base_name, "request_id": number}

    def _check_bounds(self, document: Mapping[str, Any]) -> None:
        """What vLLM would take otherwise than the router has counted it, or at the price of the engine."""

        def need(holds: bool, name: str, expected: str) -> None:
            if not holds:
                raise invalid(f"{name}: expected {expected}", name, "invalid_value")

        need(type(document.get("n", 1)) is int, "n", "a whole number")
        need(isinstance(document.get("stream", False), bool), "stream", "true or false")
        for name, most in _MOST_ENTRIES.items():
            value = document.get(name, ())
            need(not isinstance(value, (list, dict)) or len(value) <= most, name, f"at most {most} of them")
        words = document.get("bad_words", ())
        size = sum(map(len, filter(lambda word: isinstance(word, str), words))) if isinstance(words, list) else 0
        need(size <= _MOST_BAD_CHARACTERS, "bad_words", f"at most {_MOST_BAD_CHARACTERS} characters together")
        variables = document.get("chat_template_kwargs", {})
        strange = [key for key in _NO_VARIABLES if isinstance(variables, dict) and key in variables]
        need(not strange, "chat_template_kwargs", f"variables of the template, which {' '.join(strange)} is not")
        vocab_size, prompt = self._engine.llm.model_config.get_vocab_size(), document.get("prompt")
        for tokens in prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], list) else [prompt]:
            own = [token for token in tokens if isinstance(token, int)] if isinstance(tokens, list) else []
            need(all(0 <= token < vocab_size for token in own), "prompt", f"token ids below {vocab_size}")

    def _speak(self, template: str, document: Mapping[str, Any]) -> str:
        """A chat through an adapter's own template."""
        for name in _NOT_GIVEN:
            if document.get(name):
                told = "this adapter's own chat template is given messages alone; leave it out"
                raise invalid(f"{name}: {told}", name, "unsupported_value")
        return self._engine.render(template, [_plain(message) for message in document["messages"]])

    def _refusal(self, call: Call, error: Exception) -> Reply:
        told = self._as_api_error(call, error)
        if told.status == 500:
            logger.error("request failed", exc_info=error)
        return error_reply(told)

    def _as_api_error(self, call: Call, error: Exception) -> ApiError:
        if isinstance(error, CtsError):
            return as_api_error(error)
        if reason := self._engine.end:
            return unavailable(f"the engine is not running: {reason}")
        if isinstance(error, VLLMValidationError):
            message = Exception.__str__(error)
            own = error.parameter in ("input_tokens", "input_text")  # a field of nobody's
            too_long = own or error.parameter in ("max_tokens", "max_completion_tokens")
            param = {"chat": "messages", "completions": "prompt"}[call.endpoint] if own else error.parameter
            return invalid(message, param, "context_length_exceeded" if too_long else "invalid_value")
        return _api_error(create_error_response(error))

    def _told(self, event: str) -> ApiError:
        """What vLLM says in mid-stream."""
        if reason := self._engine.end:
            return unavailable(f"the engine is not running: {reason}")
        line = event.partition("\n")[0].removeprefix("data: ")
        return _api_error(ErrorResponse.model_validate(json.loads(line)))


def _validated(kind: type[Any], document: Mapping[str, Any]) -> Any:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        raise invalid(f"{name or 'the body'}: {first['msg']}", name, "invalid_value") from None
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        # vLLM's validators look into fields before they know of what kind they are.
        raise invalid(f"a field is not of the kind it should be ({type(error).__name__}: {error})") from None


class _Models(OpenAIServingModels):
    def model_name(self, lora_request: Any = None) -> str:
        """An adapter's id, without the served revision that vLLM's name of it has for its cache."""
        return str(super().model_name() if lora_request is None else lora_request.lora_name.rpartition("@")[0])


class _LoraRequests(Mapping[str, Any]):
    """Adapter id -> vLLM's request for it, made when it is asked for."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine, self._map = engine, engine.serving_map

    def __getitem__(self, adapter_id: str) -> Any:
        return self._engine.lora_request(self._map.adapters[adapter_id])

    def __contains__(self, adapter_id: object) -> bool:
        return adapter_id in self._map.adapters

    def __iter__(self) -> Iterator[str]:
        return iter(self._map.adapters)

    def __len__(self) -> int:
        return len(self._map.adapters)

    def values(self) -> Any:
        return ()  # vLLM looks for adapters by the kind of a message's content in them: there are none here


def _api_error(response: ErrorResponse) -> ApiError:
    error = response.error
    status = int(error.code)
    if status >= 500:
        return internal_error()
    if status == 404:
        return ApiError(404, error.message, kind="invalid_request_error", param="model", code="model_not_found")
    return ApiError(status, error.message, kind="invalid_request_error", param=error.param)


def _plain(message: Any) -> Any:
    """Text parts joined by line feeds."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return message | {"content": "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))}
