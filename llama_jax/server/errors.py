"""Errors in OpenAI's format: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_jax.errors import (
    DoesNotFit,
    EngineFailed,
    LlamaJaxError,
    Overloaded,
    RequestError,
    TemplateError,
    TokenizerError,
)

RETRY_S = 1
"""Seconds after which a client that was turned away may try again."""

STATUSES: tuple[tuple[type[LlamaJaxError], int, str], ...] = (
    (RequestError, 400, "invalid_request_error"),
    (DoesNotFit, 400, "invalid_request_error"),
    (TemplateError, 400, "invalid_request_error"),
    (TokenizerError, 400, "invalid_request_error"),
    (Overloaded, 429, "rate_limit_error"),
    (EngineFailed, 503, "overloaded_error"),
    (LlamaJaxError, 500, "server_error"),
)
"""Status and type by error class; the first matching class counts."""

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 503: "overloaded_error"}


class Refused(LlamaJaxError):
    """A request rejected before it reached the engine; `status` is HTTP's, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        hint: str = "",
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message, hint=hint)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


@dataclass(frozen=True)
class Failure:
    """The answer to a request that failed."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The answer for an error. It reveals nothing of errors that are not ours: their texts may quote anybody."""
        if isinstance(error, Refused):
            kind = _KINDS.get(error.status, "invalid_request_error")
            return cls(error.status, _body(error, kind, error.param, error.code), error.headers)
        if not isinstance(error, LlamaJaxError):
            error = LlamaJaxError("the server has failed", hint="its log has the reason, under this request's id")
        status, kind = next((status, kind) for of, status, kind in STATUSES if isinstance(error, of))
        pause = error.retry_s if isinstance(error, EngineFailed) else 0
        headers = {"retry-after": str(max(RETRY_S, math.ceil(pause)))} if status in (429, 503) else {}
        return cls(status, _body(error, kind, getattr(error, "param", None), type(error).__name__), headers)


def _body(error: LlamaJaxError, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


_ANTHROPIC_KINDS = {413: "request_too_large", 500: "api_error"}


def anthropic_body(failure: Failure) -> dict[str, Any]:
    """Return a failure's body in Anthropic's format, with OpenAI's param and code."""
    error = failure.body["error"]
    return {"type": "error", "error": {**error, "type": _ANTHROPIC_KINDS.get(failure.status, error["type"])}}


def body_of(failure: Failure, path: str) -> Mapping[str, Any]:
    """Return a failure's body in the format of the path's API."""
    return anthropic_body(failure) if path.startswith("/v1/messages") else failure.body
