"""The HTTP routes of the application, and errors in OpenAI's shape for whatever goes wrong on the way."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from ray import serve
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from cluster.errors import CtsError
from serve_app.openai.call import Endpoint, error_reply
from serve_app.openai.errors import ApiError, as_api_error, encoded, internal_error, too_large, too_slow
from serve_app.routing.responses import as_json
from serve_app.routing.router import Router

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class BodyLimits:
    max_bytes: int
    timeout_s: float


def make_api(limits: BodyLimits, allowed_origins: Sequence[str] = ()) -> FastAPI:
    """Called in the router's replica; the routes ask the Router object that lives there."""
    api = FastAPI(title="compress-then-serve", docs_url=None, redoc_url=None, openapi_url=None)
    api.state.limits = limits
    api.post("/v1/completions")(completions)
    api.post("/v1/chat/completions")(chat_completions)
    api.post("/tokenize")(tokenize)
    api.post("/detokenize")(detokenize)
    for path, answer in (
        ("/v1/models", list_models),
        ("/v1/models/{model_id:path}", retrieve_model),
        ("/health", health),
        ("/ready", ready),
    ):
        api.api_route(path, methods=["GET", "HEAD"])(answer)
    if allowed_origins:
        # Without credentials: keys travel in a header of their own.
        api.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Served-Revision", "X-Adapter", "X-Cluster", "X-Request-ID", "Retry-After"],
        )
    api.exception_handler(CtsError)(answer_error)
    api.exception_handler(HTTPException)(answer_http_error)
    api.exception_handler(Exception)(answer_unexpected)
    return api


def router() -> Router:
    found = serve.get_replica_context().servable_object
    assert isinstance(found, Router)
    return found


# Bodies are parsed by who answers, not by FastAPI: its own errors have another status and another shape.
async def completions(request: Request) -> Response:
    return await pass_on("completions", request)


async def chat_completions(request: Request) -> Response:
    return await pass_on("chat", request)


async def tokenize(request: Request) -> Response:
    return await pass_on("tokenize", request)


async def detokenize(request: Request) -> Response:
    return await pass_on("detokenize", request)


async def pass_on(endpoint: Endpoint, request: Request) -> Response:
    # A header's bytes, as they came: the same text in the body's user is the same key.
    sticky_key = request.headers.get("x-sticky-key", "").encode("latin-1")
    return await router().answer(endpoint, await read_body(request), sticky_key)


async def read_body(request: Request) -> bytes:
    """Raises ApiError for a body that is too large, as soon as that is known, too slow, or zipped."""
    limits: BodyLimits = request.app.state.limits
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise encoded(encoding)
    announced = request.headers.get("content-length", "")
    received = bytearray()
    try:
        async with asyncio.timeout(limits.timeout_s):
            if announced.isdecimal() and int(announced[:20]) > limits.max_bytes:
                raise too_large(limits.max_bytes)
            async for piece in request.stream():
                received += piece
                if len(received) > limits.max_bytes:
                    raise too_large(limits.max_bytes)
    except TimeoutError:
        raise too_slow(limits.timeout_s) from None
    return bytes(received)


async def list_models(request: Request) -> Response:
    return as_json(router().list_models(request.query_params))


async def retrieve_model(model_id: str) -> Response:
    # No id ends in a slash.
    return as_json(router().card(model_id.rstrip("/")))


async def health() -> Response:
    return JSONResponse({"status": "alive"})


async def ready(request: Request) -> Response:
    is_ready, states = router().readiness(strict=request.query_params.get("all") in ("1", "true"))
    return JSONResponse(states, status_code=200 if is_ready else 503)


async def answer_error(_: Request, error: Exception) -> Response:
    answer = as_api_error(error)
    if answer.status == 500:
        logger.error("request failed", exc_info=error)
    return _answer(answer, answer.headers)


async def answer_http_error(request: Request, error: HTTPException) -> Response:
    """FastAPI's own: no such path, or not with this method."""
    code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
    message = f"{error.detail}: {request.method} {request.url.path}"
    answer = ApiError(error.status_code, message, kind="invalid_request_error", code=code)
    return _answer(answer, error.headers)


async def answer_unexpected(_: Request, error: Exception) -> Response:
    """Starlette raises it again after this answer, which puts it in the log."""
    return _answer(internal_error())


def _answer(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    return Response(error_reply(error).body, error.status, headers, media_type="application/json")
