"""Answers other than 200, in the OpenAI API's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from typing import Any

from cluster.errors import EngineStopped, HomeUnavailable, RequestError, ServeError, UnknownAdapter

# Of a 503: another replica, or this one's successor, may be there by then.
RETRY_AFTER_S = 1


class ApiError(ServeError):
    """An answer other than 200, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, kind="invalid_request_error", param=param, code=code)


def too_large(max_bytes: int) -> ApiError:
    message = f"The body has more than {max_bytes} bytes (limits.max_body); send less"
    return ApiError(413, message, kind="invalid_request_error", code="body_too_large")


def encoded(encoding: str) -> ApiError:
    message = f"The body's Content-Encoding is {encoding[:100]!r}; send it as it is, without one"
    return ApiError(415, message, kind="invalid_request_error", code="unsupported_encoding")


def too_slow(timeout_s: float) -> ApiError:
    message = f"The body was not there after {timeout_s:g} s (http.receive_timeout_s)"
    return ApiError(408, message, kind="timeout_error", code="body_too_slow")


def unavailable(message: str, retry_after_s: int = RETRY_AFTER_S) -> ApiError:
    return ApiError(
        503, message, kind="service_unavailable_error", code="service_unavailable", retry_after_s=retry_after_s
    )


def overloaded(message: str, retry_after_s: int) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", retry_after_s=retry_after_s)


def timed_out(message: str) -> ApiError:
    return ApiError(504, message, kind="timeout_error", code="timeout")


def unknown_model(model: str) -> ApiError:
    message = f"The model {model[:100]!r} does not exist; GET /v1/models lists those that do"
    return ApiError(404, message, kind="invalid_request_error", param="model", code="model_not_found")


def unknown_target(alias: str, target: str) -> ApiError:
    message = (
        f"The model {alias!r} is an alias, and the adapter that it names for this request, {target!r}, is not in the "
        f"served revision; GET /v1/models/{alias} lists its targets"
    )
    return ApiError(404, message, kind="invalid_request_error", param="model", code="model_not_found")


def internal_error() -> ApiError:
    """Says nothing about the inside: the log does."""
    return ApiError(500, "The server failed to answer; its log has the reason", kind="server_error", code="internal")


def as_api_error(error: Exception) -> ApiError:
    """What an error of ours, or any other, is to a client."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return invalid(error.message, error.param, error.code)
        case UnknownAdapter():
            return ApiError(404, str(error), kind="invalid_request_error", param="model", code="model_not_found")
        case HomeUnavailable() | EngineStopped():
            return unavailable(str(error))
        case _:
            return internal_error()
