"""The REST edge: its routes, each a few lines from a body to an answer. Knows no replica.

A refusal before the first token is an HTTP status; after it an error event ends the stream (calls.py). How refusals look: refusals.py.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import time
from dataclasses import asdict
from typing import Final

import msgspec
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from duomo.errors import CapacityError, RequestError
from duomo.telemetry.metrics import CONTENT_TYPE
from services.router.auth import Guard, needed_scopes
from services.router.body import read_body
from services.router.calls import Call
from services.router.chat_answers import ChatShape
from services.router.common_fields import CommonReader
from services.router.completion_answers import CompletionShape
from services.router.gateway import Gateway
from services.router.idempotency import Idempotency
from services.router.keys import Keys
from services.router.message_answers import MessageShape
from services.router.message_requests import MessageParser
from services.router.openai import RequestParser
from services.router.openapi import openapi_document
from services.router.prompts import PromptMaker
from services.router.refusals import answer_refusals
from services.router.response_answers import ResponseShape
from services.router.response_requests import ResponseParser
from services.router.tokenizing import Tokenizing

log = logging.getLogger(__name__)

_JSON: Final = "application/json"


def build_app(gateway: Gateway, keys: Keys, idempotency: Idempotency | None = None) -> FastAPI:
    """The application; whoever runs it starts the gateway before and stops it after. Without `idempotency` its keys are refused (503)."""
    app = FastAPI(title="Duomo", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    edge = Edge(gateway, idempotency)
    app.add_route("/v1/chat/completions", edge.chat, methods=["POST"])
    app.add_route("/v1/completions", edge.completion, methods=["POST"])
    app.add_route("/v1/responses", edge.response, methods=["POST"])
    app.add_route("/v1/messages", edge.message, methods=["POST"])
    app.add_route("/v1/messages/count_tokens", edge.count_message_tokens, methods=["POST"])
    app.add_route("/tokenize", edge.tokenize, methods=["POST"])
    app.add_route("/detokenize", edge.detokenize, methods=["POST"])
    app.add_route("/v1/models", edge.models, methods=["GET"])
    app.add_route("/v1/models/{name:path}", edge.model, methods=["GET"])
    app.add_route("/health/live", edge.live, methods=["GET"])
    app.add_route("/health/ready", edge.ready, methods=["GET"])
    app.add_route("/metrics", edge.metrics, methods=["GET"])
    app.add_route("/openapi.json", edge.openapi, methods=["GET"])
    if gateway.config.gateway.serves_pool_report:
        app.add_route("/admin/pools", edge.pools, methods=["GET"])
        app.add_route("/admin/experts", edge.experts, methods=["GET"])
    answer_refusals(app)
    needed = functools.partial(needed_scopes, metrics_need_key=gateway.config.gateway.metrics_need_key)
    host = gateway.config.gateway.host
    app.add_middleware(Guard, keys=keys, needed=needed, refused=lambda code, _: gateway.count_refused(code), host=host)
    return app


class Edge:
    """One gateway's endpoints."""

    def __init__(self, gateway: Gateway, idempotency: Idempotency | None) -> None:
        section = gateway.config.gateway
        self._gateway = gateway
        self._idempotency = idempotency
        self._section = section
        reader = CommonReader(section, gateway.card.name, gateway.card.vocab_size)
        self._parser = RequestParser(section, reader)
        self._message_parser = MessageParser(reader)
        self._response_parser = ResponseParser(reader)
        self._prompts = PromptMaker(section, gateway.card, gateway.text, gateway.pools.most_tokens)
        self._tokenizing = Tokenizing(self._parser, gateway.card, gateway.text)
        self._model = _model_object(gateway)
        self._document = openapi_document(section, gateway.card)

    async def chat(self, request: Request) -> Response:
        call = self._call(request, "chatcmpl-", "chat")
        with call.refusing():
            asked = self._parser.chat(await call.body(request))
            chat = await self._prompts.chat(asked, call.template(asked.common))
        shape = ChatShape(
            call.head(chat.common, chat.requests), chat.style, chat.requests[0].scored, num_choices=chat.common.answer.num_choices
        )
        return await call.answer(request, chat.requests, chat.common, shape)

    async def completion(self, request: Request) -> Response:
        call = self._call(request, "cmpl-", "text_completion")
        with call.refusing():
            asked = self._parser.completion(await call.body(request))
            requests = await self._prompts.completion(asked, call.template(asked.common))
        sampled, shown = asked.common.answer.num_choices, asked.num_shown
        scored = [one.scored for one in requests if one.scored is not None]
        echoes = self._prompts.echoes(asked)
        shape = CompletionShape(call.head(asked.common, requests), echoes, scored=scored, num_sampled=sampled, num_shown=shown)
        return await call.answer(request, requests, asked.common, shape)

    async def response(self, request: Request) -> Response:
        call = self._call(request, "resp_", "chat")
        with call.refusing():
            asked = self._response_parser.response(await call.body(request))
            chat = await self._prompts.chat(asked.chat, call.template(asked.chat.common))
        return await call.answer(
            request, chat.requests, chat.common, ResponseShape(call.head(chat.common, chat.requests), chat.style, asked.echo)
        )

    async def message(self, request: Request) -> Response:
        call = self._call(request, "msg_", "chat")
        with call.refusing():
            asked = self._message_parser.message(await call.body(request))
            chat = await self._prompts.chat(asked.chat, call.template(asked.chat.common))
            if asked.wants_thinking and chat.style.reasoning == "none":
                raise RequestError("'thinking' cannot be turned on: this model marks no reasoning for such a request.", param="thinking")
        shape = MessageShape(call.head(chat.common, chat.requests), chat.style, len(chat.requests[0].prompt_ids))
        return await call.answer(request, chat.requests, chat.common, shape)

    async def count_message_tokens(self, request: Request) -> Response:
        conversation = self._message_parser.count(await read_body(request, self._section.max_body_bytes))
        return _json_response(200, await self._tokenizing.count(conversation))

    async def tokenize(self, request: Request) -> Response:
        return _json_response(200, await self._tokenizing.tokenize(await read_body(request, self._section.max_body_bytes)))

    async def detokenize(self, request: Request) -> Response:
        return _json_response(200, await self._tokenizing.detokenize(await read_body(request, self._section.max_body_bytes)))

    async def models(self, request: Request) -> Response:
        return _json_response(200, msgspec.json.encode({"object": "list", "data": [self._model]}))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._gateway.card.name:
            raise RequestError(f"The model '{name}' does not exist.", param="model", status=404, code="model_not_found")
        return _json_response(200, msgspec.json.encode(self._model))

    async def live(self, request: Request) -> Response:
        return _json_response(200, b'{"status":"live"}')

    async def ready(self, request: Request) -> Response:
        reason = self._gateway.why_not_ready()
        if reason is not None:
            raise CapacityError(f"Not ready: {reason}.", code="not_ready")
        return _json_response(200, b'{"status":"ready"}')

    async def metrics(self, request: Request) -> Response:
        metrics, desired = self._gateway.metrics, self._gateway.desired_replicas()
        metrics.desired_replicas.labels("prefill").set(desired.prefill)
        metrics.desired_replicas.labels("decode").set(desired.decode)
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        return _json_response(200, self._document)

    async def pools(self, request: Request) -> Response:
        return _json_response(200, msgspec.json.encode(pool_report(self._gateway)))

    async def experts(self, request: Request) -> Response:
        return _json_response(200, msgspec.json.encode(expert_report(self._gateway)))

    def _call(self, request: Request, prefix: str, endpoint: str) -> Call:
        received_s = time.monotonic()
        return Call(self._gateway, prefix + secrets.token_hex(12), endpoint, received_s, request.headers, self._idempotency)


def expert_report(gateway: Gateway) -> dict[str, object]:
    """All experts of all layers, by pool."""
    return {"pools": {role: loads.as_json() for role, loads in gateway.metrics.experts.pools().items()}}


def pool_report(gateway: Gateway) -> dict[str, object]:
    """What an operator or a test sees from outside: each replica's last report, and what this gateway itself holds."""
    now_s = time.monotonic()
    replicas = [
        {
            "replica_id": link.member.replica_id,
            "boot_id": link.key,
            "role": link.role,
            "address": link.member.address,
            "rtt_s": link.connection.rtt_s,
            "report_age_s": now_s - link.book.received_s if link.report is not None else None,
            "gateway_legs": len(link.legs),
            "gateway_queued_tokens": link.book.queued_tokens,
            "gateway_reserved_blocks": link.book.reserved_blocks,
            "num_prefixes": len(link.report.prefix_digests) if link.report is not None else 0,
            # Experts: /admin/experts. Prefixes: their number alone, since JSON's readers round integers of 64 bits.
            "report": None if link.report is None else msgspec.structs.replace(link.report, experts=None, prefix_digests=()),
        }
        for link in gateway.pools.links.values()
    ]
    own = {
        "replica_id": gateway.replica_id,
        "boot_id": gateway.boot_id,
        "pid": os.getpid(),
        "num_live_requests": gateway.num_live_requests,
        "num_open_answers": gateway.num_open_answers,
        "num_waiting_requests": gateway.num_waiting,
        "num_live_legs": gateway.num_live_legs,
        "num_open_spans": gateway.tracing.num_open_spans(),
        "is_directory_reachable": gateway.pools.is_directory_reachable,
        "is_draining": gateway.is_draining,
        "dropped_tokens": dict(gateway.dropped_tokens),
    }
    return {"replicas": replicas, "gateway": own, "desired_replicas": asdict(gateway.desired_replicas())}


def _model_object(gateway: Gateway) -> dict[str, object]:
    card = gateway.card
    return {
        "id": card.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "duomo",
        "root": card.name,
        "max_model_len": card.context_tokens,
        "context_length": card.context_tokens,
        "vocab_size": card.vocab_size,
        "total_parameters": card.total_params,
        "active_parameters": card.active_params,
        "num_experts": card.num_experts,
        "experts_per_token": card.experts_per_token,
        "fingerprint": card.fingerprint,
    }


def _json_response(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status_code=status, media_type=_JSON, headers=headers)
