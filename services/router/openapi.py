"""The OpenAPI document that GET /openapi.json serves: every endpoint with its bodies, answers and refusals. Knows no request.

It describes what hand-written parsers and shapes do, and does nothing itself: tests/services/router/test_openapi*.py hold both to each
other, field by field. Bodies and answers are in openapi_*.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

import msgspec

from duomo.config_gateway import GatewaySection
from duomo.wire.messages import ReplicaReport
from services.router.auth import needed_scopes
from services.router.model_card import ModelCard
from services.router.openapi_answers import answer_schemas, report_schemas
from services.router.openapi_chat import chat_schemas
from services.router.openapi_fields import Limits
from services.router.openapi_messages import message_schemas
from services.router.openapi_responses import response_schemas
from services.router.openapi_words import Schema, ref

_COMPONENTS: Final = "#/components/schemas/{name}"
_JSON: Final = "application/json"
_REFUSALS: Final = {
    400: "The body or a header is refused; `param` names the field.",
    401: "No API key, or none that is known, where keys are asked for.",
    403: "The API key has not the scope of this endpoint.",
    404: "No such model.",
    408: "The request's time was over before its first token, or its headers or body came too slowly.",
    409: "The first request with this Idempotency-Key still runs; Retry-After says when to come again.",
    413: "The body is larger than gateway.max_body_bytes.",
    422: "This Idempotency-Key came with another body before.",
    429: "There is too much to do; Retry-After says when to come again.",
    431: "More or larger headers than gateway.max_headers and gateway.max_header_bytes.",
    500: "A fault of the server's.",
    503: "No replica is there, or one was lost, or gateway.max_connections is reached; Retry-After says when to come again.",
}
_ANSWER_HEADERS: Final = {
    "x-request-timeout": {"schema": {"type": "string"}, "description": "The seconds that the request was given, where it asked for some."},
    "idempotent-replayed": {"schema": {"type": "string"}, "description": "This answer was given before, under the same Idempotency-Key."},
}
_ANY: Final = (408, 431, 500)
_KEYED: Final = (401, 403)
_PARSED: Final = (400, 404, 413)
_GENERATED: Final = (400, 404, 409, 413, 422, 429, 503)
_RETRIED: Final = (409, 429, 503)
_MARKED: Final = ("ChatCompletionChunk", "CompletionChunk")
_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "`Authorization: Bearer KEY`, as OpenAI's clients send it."},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's clients send it."},
}
_HEADERS: Final = (
    {
        "name": "X-Request-Timeout",
        "in": "header",
        "schema": {"type": "string", "pattern": r"^[0-9]{1,9}(\.[0-9]{1,9})?$"},
        "description": "Seconds above 0 that the whole answer may take; never more than gateway.request_deadline_s.",
    },
    {
        "name": "X-Session-Id",
        "in": "header",
        "schema": {"type": "string", "maxLength": 256},
        "description": "As prompt_cache_key, before which it goes.",
    },
    {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]([ -~]*[!-~])?$"},
        "description": "A request that comes again with the same key and body gets the first one's answer, and generates nothing.",
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One operation. body and answer name components; event: of a stream; media: of an answer that is no JSON."""

    method: str
    path: str
    about: str
    answer: str = ""
    body: str = ""
    event: str = ""
    refusals: tuple[int, ...] = ()
    media: str = _JSON


_ENDPOINTS: Final = (
    Endpoint(
        method="post",
        path="/v1/chat/completions",
        about="OpenAI's chat completions, streamed or whole.",
        body="ChatCompletionRequest",
        answer="ChatCompletion",
        event="ChatCompletionChunk",
        refusals=_GENERATED,
    ),
    Endpoint(
        method="post",
        path="/v1/completions",
        about="OpenAI's completions, streamed or whole.",
        body="CompletionRequest",
        answer="Completion",
        event="CompletionChunk",
        refusals=_GENERATED,
    ),
    Endpoint(
        method="post",
        path="/v1/responses",
        about="OpenAI's responses, streamed or whole; none is kept.",
        body="ResponseRequest",
        answer="Response",
        event="ResponseEvent",
        refusals=_GENERATED,
    ),
    Endpoint(
        method="post",
        path="/v1/messages",
        about="Anthropic's messages, streamed or whole.",
        body="MessageRequest",
        answer="Message",
        event="MessageEvent",
        refusals=_GENERATED,
    ),
    Endpoint(
        method="post",
        path="/v1/messages/count_tokens",
        about="How many tokens a message's prompt has.",
        body="CountTokensRequest",
        answer="TokenCount",
        refusals=_PARSED,
    ),
    Endpoint(
        method="post",
        path="/tokenize",
        about="The token ids of a prompt, or of messages as the chat template renders them.",
        body="TokenizeRequest",
        answer="Tokens",
        refusals=_PARSED,
    ),
    Endpoint(
        method="post", path="/detokenize", about="The text of token ids.", body="DetokenizeRequest", answer="Prompt", refusals=_PARSED
    ),
    Endpoint(method="get", path="/v1/models", about="The served model, in a list.", answer="ModelList"),
    Endpoint(method="get", path="/v1/models/{name}", about="The served model.", answer="Model", refusals=(404,)),
    Endpoint(method="get", path="/health/live", about="The process answers.", answer="Health"),
    Endpoint(method="get", path="/health/ready", about="Requests can be served.", answer="Health", refusals=(503,)),
    Endpoint(method="get", path="/metrics", about="Prometheus' text.", media="text/plain"),
    Endpoint(method="get", path="/openapi.json", about="This document.", answer="Document"),
)
_REPORTS: Final = (
    Endpoint(method="get", path="/admin/pools", about="Each replica's last report, and what this gateway holds.", answer="PoolReport"),
    Endpoint(method="get", path="/admin/experts", about="How the experts of each pool are used.", answer="ExpertReport"),
)


def openapi_document(section: GatewaySection, card: ModelCard) -> bytes:
    """OpenAPI 3.1 as JSON, with the limits of this configuration and model."""
    limits = Limits(
        model_name=card.name,
        vocab_size=card.vocab_size,
        max_choices=section.max_choices,
        max_logprobs=section.max_logprobs,
        max_stop_strings=section.max_stop_strings,
    )
    endpoints = _ENDPOINTS + (_REPORTS if section.serves_pool_report else ())
    paths: dict[str, dict[str, object]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint, section)
    about = "MoE language models served by two pools, behind the APIs that client apps already speak. Refusals name the field."
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Duomo", "version": version("duomo"), "description": about, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {"schemas": _schemas(limits, has_reports=section.serves_pool_report), "securitySchemes": _SCHEMES},
    }
    return msgspec.json.encode(document)


def _schemas(limits: Limits, *, has_reports: bool) -> dict[str, Schema]:
    written: dict[str, Schema] = {
        **chat_schemas(limits),
        **response_schemas(limits),
        **message_schemas(limits),
        **answer_schemas(),
        "Document": {"type": "object"},
    }
    (report,), wire = msgspec.json.schema_components([ReplicaReport], ref_template=_COMPONENTS)
    reports = report_schemas(report)
    return {**written, **reports, **wire} if has_reports else {**written, "Health": reports["Health"]}


def _operation(endpoint: Endpoint, section: GatewaySection) -> dict[str, object]:
    is_guarded = bool(needed_scopes(endpoint.path, metrics_need_key=section.metrics_need_key))
    asks_for_key = is_guarded and section.has_keys
    refusals = {*_ANY, *endpoint.refusals, *((503,) if is_guarded else ()), *(_KEYED if asks_for_key else ())}
    content: dict[str, object] = {endpoint.media: {"schema": ref(endpoint.answer) if endpoint.answer else {"type": "string"}}}
    if endpoint.event:
        content["text/event-stream"] = {"schema": _event(endpoint.event, has_mark=endpoint.event in _MARKED)}
    answered: dict[str, object] = {"description": endpoint.about, "content": content}
    if endpoint.event:
        named = {name: {"required": True, "schema": {"type": "string"}} for name in ("x-request-id", "request-id")}
        answered["headers"] = {**named, **_ANSWER_HEADERS}
    parameters: list[object] = list(_HEADERS) if endpoint.event else []
    if "{name}" in endpoint.path:
        parameters.append({"name": "name", "in": "path", "required": True, "schema": {"type": "string"}})
    operation: dict[str, object] = {
        "operationId": endpoint.method + endpoint.path.translate(str.maketrans("/.", "__", "{}")),
        "summary": endpoint.about,
        "responses": {"200": answered} | {str(status): _refusal(endpoint.path, status) for status in sorted(refusals)},
        "security": [{name: []} for name in _SCHEMES] if asks_for_key else [{}],
    }
    if endpoint.body:
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": ref(endpoint.body)}}}
    if parameters:
        operation["parameters"] = parameters
    return operation


def _event(name: str, *, has_mark: bool) -> Schema:
    """One event of a stream, as WHATWG has them; its data is JSON, or the mark at the end of OpenAI's older streams."""
    data: Schema = {"type": "string", "contentMediaType": "application/json", "contentSchema": ref(name)}
    fields: Schema = {"event": {"type": "string"}, "data": {"anyOf": [data, {"const": "[DONE]"}]} if has_mark else data}
    return {"type": "object", "properties": fields, "required": ["data"], "description": "Each event of the stream."}


def _refusal(path: str, status: int) -> dict[str, object]:
    error = "MessageError" if path.startswith("/v1/messages") else "Error"
    refusal: dict[str, object] = {"description": _REFUSALS[status], "content": {_JSON: {"schema": ref(error)}}}
    if status == 401:
        refusal["headers"] = {"WWW-Authenticate": {"required": True, "schema": {"type": "string"}}}
    if status in _RETRIED:
        refusal["headers"] = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}}}
    return refusal
