"""Answers of a replica with the vLLM engine, made by vLLM's own serving classes: what its server honours is honoured.

    body -> vLLM's request (vllm_request.py) -> vLLM's chat or completions, on the engine that this replica owns -> JSON

An adapter's name means what the serving map says. vLLM's names are checked in
``serve_app/engine/vllm/plugin/compatibility.py``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.online_renderer import OnlineRenderer

from cluster.bundle.serving_map import ServedAdapter
from cluster.errors import ConfigError, CtsError
from serve_app.arguments import VllmArguments
from serve_app.engine.vllm.engine import VllmEngine
from serve_app.openai.call import Call, Endpoint, Reply, error_reply
from serve_app.openai.errors import ApiError, as_api_error, internal_error, invalid, unavailable
from serve_app.replica.answering import merge
from serve_app.replica.vllm_request import make_request

logger = logging.getLogger("ray.serve")

# Where an adapter's own template speaks, which is given the messages alone.
_NOT_GIVEN = (
    "tools",
    "documents",
    "chat_template_kwargs",
    "reasoning_effort",
    "continue_final_message",
    "add_generation_prompt",
)
# A template that says nothing but what an adapter's own has said: it ran in a process of its own.
_SPOKEN = "{{ cts_spoken }}"
_ERROR = 'data: {"error"'
# The model field of the request that is being begun: vLLM asks its models for it by the adapter alone.
_asked_for: ContextVar[str] = ContextVar("asked_for")


class VllmAnswers:
    """Implements ``serve_app.replica.answering.Answers``. The engine has started. Raises ConfigError for arguments that
    vLLM does not take."""

    def __init__(self, engine: VllmEngine, arguments: VllmArguments) -> None:
        self._engine = engine
        try:
            self._make_serving(arguments, engine.base_name)
        except (KeyError, OSError, TypeError, ValueError, VLLMValidationError) as error:
            given = ", ".join(f"vllm.{name} {value!r}" for name, value in vars(arguments).items() if value)
            raise ConfigError(f"vLLM does not take its arguments ({given}): {error}") from error

    def _make_serving(self, arguments: VllmArguments, base_name: str) -> None:
        llm = self._engine.llm
        models = _Models(llm, [BaseModelPath(base_name, base_name)])
        models.lora_requests = _LoraRequests(self._engine)
        template: dict[str, Any] = {
            "request_logger": None,
            "chat_template": load_chat_template(arguments.chat_template),
            "chat_template_content_format": "auto",
            "trust_request_chat_template": True,  # ours alone: a client's is refused
        }
        parsers: dict[str, Any] = {
            "enable_auto_tools": arguments.enable_auto_tool_choice,
            "tool_parser": arguments.tool_call_parser,
            "reasoning_parser": arguments.reasoning_parser or "",
        }
        renderer = OnlineRenderer(llm.model_config, llm.renderer, **template, **parsers)
        chat = OpenAIServingChat(llm, models, "assistant", online_renderer=renderer, **template, **parsers)
        completions = OpenAIServingCompletion(llm, models, online_renderer=renderer, request_logger=None)
        tokens = ServingTokenization(models, renderer, **template)
        for serving in (chat, completions):
            serving.system_fingerprint = None  # vLLM's own; here it is the served revision
        self._creators: dict[Endpoint, Callable[..., Awaitable[Any]]] = {
            "chat": chat.create_chat_completion,
            "completions": completions.create_completion,
            "tokenize": tokens.create_tokenize,
            "detokenize": tokens.create_detokenize,
        }

    async def answer(self, call: Call) -> Reply:
        try:
            async with self._engine.holding(self._served(call), call.num_sequences):
                result = await self._create(call)
                if call.endpoint in ("chat", "completions"):
                    result.system_fingerprint = call.served
                return Reply(200, result.model_dump_json().encode())
        except Exception as error:
            return self._refusal(call, error)

    async def stream(self, call: Call) -> AsyncGenerator[Reply | bytes, None]:
        try:
            async with (
                self._engine.holding(self._served(call), call.num_sequences),
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
        return None if call.adapter is None else self._engine.find(call.adapter, call.revision)

    async def _create(self, call: Call) -> Any:
        """vLLM's whole answer, or its generator of events. Raises ApiError, and whatever vLLM raises."""
        request, fields = make_request(call, self._engine.base_name, self._engine.llm.model_config.get_vocab_size())
        if stops := getattr(request, "stop", None):
            special = self._engine.special_stops([stops] if isinstance(stops, str) else stops)
            if special and request.skip_special_tokens:
                request.stop_token_ids = [*(request.stop_token_ids or ()), *special]
        served = self._served(call)
        if "messages" in fields and served is not None and served.chat_template is not None:
            text = await asyncio.to_thread(self._speak, served.chat_template, fields)
            request.chat_template, request.chat_template_kwargs = _SPOKEN, {"cts_spoken": text}
        _asked_for.set(fields["model"])
        result = await self._creators[call.endpoint](request, None)
        if isinstance(result, ErrorResponse):
            raise _api_error(result)
        return result

    def _speak(self, template: str, fields: Mapping[str, Any]) -> str:
        """A chat through an adapter's own template."""
        for name in _NOT_GIVEN:
            if fields.get(name) or (name == "add_generation_prompt" and fields.get(name) is False):
                told = "this adapter's own chat template is given messages alone; leave it out"
                raise invalid(f"{name}: {told}", name, "unsupported_value")
        return self._engine.render(template, [_plain(message) for message in fields["messages"]])

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
            param = ("messages" if call.endpoint == "chat" else "prompt") if own else error.parameter
            return invalid(message, param, "context_length_exceeded" if too_long else "invalid_value")
        return _api_error(create_error_response(error))

    def _told(self, event: str) -> ApiError:
        """What vLLM says in mid-stream."""
        if reason := self._engine.end:
            return unavailable(f"the engine is not running: {reason}")
        line = event.partition("\n")[0].removeprefix("data: ")
        return _api_error(ErrorResponse.model_validate(json.loads(line)))


class _Models(OpenAIServingModels):
    def model_name(self, lora_request: Any = None) -> str:
        """What the request that is being begun asked for, which may be an alias: vLLM's name of an adapter says neither
        that nor its id alone, but has the served revision too, for its cache."""
        return _asked_for.get()


class _LoraRequests(Mapping[str, Any]):
    """An adapter at a revision, as make_request calls it, -> vLLM's request for it, made when it is asked for."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    def __getitem__(self, model: str) -> Any:
        adapter_id, at, revision = model.rpartition("#")
        if not at:
            raise KeyError(model)  # the base's name
        return self._engine.lora_request(self._engine.find(adapter_id, int(revision)))

    def __iter__(self) -> Iterator[str]:
        return iter(())  # nobody lists them here

    def __len__(self) -> int:
        return 0

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
