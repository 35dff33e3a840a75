"""How refusals and faults before the first byte are answered: statuses, Retry-After, and the error body of whose API the path is."""

from __future__ import annotations

import logging
import math
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from duomo.errors import CapacityError, DuomoError, RequestError
from services.router.answers import error_body, error_status
from services.router.message_answers import message_error

# By OpenAI's and Anthropic's, besides 429 and every 5xx, unless x-should-retry says otherwise.
_RETRIED_BY_CLIENTS: Final = (408, 409)

log = logging.getLogger(__name__)


def answer_refusals(app: FastAPI) -> None:
    """Of every route of `app`."""
    app.add_exception_handler(DuomoError, _answer_fault)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(Exception, _answer_bug)


def refusal_of(request: Request, error: DuomoError) -> Response:
    """The answer to what failed before the first byte. Clients retry some statuses by themselves: one that will fail again says so."""
    status, headers = error_status(error), {}
    if isinstance(error, CapacityError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    elif error.retryable:
        headers["retry-after"] = "1"
    elif status in _RETRIED_BY_CLIENTS or status >= 500:
        headers["x-should-retry"] = "false"
    param = error.param if isinstance(error, RequestError) else None
    return _refusal(request, status, (error.detail, param, error.code), headers)


async def _answer_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, DuomoError)
    return refusal_of(request, error)


async def _answer_http(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path (404), no such method there (405)."""
    assert isinstance(error, HTTPException)
    known = {404: f"There is no endpoint '{request.url.path}'.", 405: f"'{request.url.path}' does not take {request.method}."}
    message = known.get(error.status_code, error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return _refusal(request, error.status_code, (message, None, code), dict(error.headers or {}))


async def _answer_bug(request: Request, error: Exception) -> Response:
    log.error("a request failed by a fault of ours", exc_info=error)
    return _refusal(request, 500, ("The server made a mistake.", None, "internal"), {})


def _refusal(request: Request, status: int, told: tuple[str, str | None, str | None], headers: dict[str, str]) -> Response:
    return refusal(request.url.path, status, told, headers)


def refusal(path: str, status: int, told: tuple[str, str | None, str | None], headers: dict[str, str]) -> Response:
    """told: message, param and code; Anthropic's body has the message alone."""
    return Response(refusal_body(path, status, told), status_code=status, media_type="application/json", headers=headers)


def refusal_body(path: str, status: int, told: tuple[str, str | None, str | None]) -> bytes:
    """In the form of whose API the path is."""
    return message_error(status, told[0]) if path.startswith("/v1/messages") else error_body(status, *told)
