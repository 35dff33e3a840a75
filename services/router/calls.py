"""One generating HTTP call from its checked requests to its answer, whole or streamed. Knows no route and no replica.

Every flight that a call submits is closed, whatever happens: that is when it is cancelled if it still runs, and accounted for. So ends its
claim on an idempotency key: the answer is kept before the client can see its end, or the key is free again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from duomo.errors import CapacityError, DeadlineError, DuomoError, RequestCancelled, RequestError
from duomo.wire.values import Sampling
from services.router.answers import AnswerHead, AnswerShape
from services.router.body import read_body
from services.router.cache_salt import cache_salt, salted
from services.router.common_fields import CommonFields
from services.router.deadlines import TIMEOUT_HEADER, allowed_s, asked_timeout_s
from services.router.flight import Flight
from services.router.gateway import Gateway
from services.router.generation import GenerationRequest
from services.router.idempotency import KEY_HEADER, Claim, Idempotency, RecordedResponse, ReplayedResponse, asked_key, claim_name
from services.router.refusals import refusal_of
from services.router.session import SESSION_HEADER, asked_session, session_of
from services.router.store import ClaimName, StoredAnswer
from services.router.streams import TRANSPORT_EXTENSION, ClientTransport, Sink, StreamResponse, StreamSink, WholeSink, watch_client
from services.router.structured import check_structure

log = logging.getLogger(__name__)

_NO_SAMPLING: Final = Sampling(max_tokens=1)


class Call:
    """One HTTP call that generates: its id and flights. endpoint: OpenTelemetry's operation, "chat" or "text_completion".

    headers: traceparent, x-session-id, x-request-timeout, idempotency-key, authorization and x-api-key (Anthropic's clients' key) are read.
    idempotency: None where this process keeps no answers; a call with a key is refused then.
    """

    def __init__(
        self, gateway: Gateway, answer_id: str, endpoint: str, received_s: float, headers: Headers, idempotency: Idempotency | None
    ) -> None:
        self._gateway = gateway
        self._idempotency = idempotency
        self._section = gateway.config.gateway
        self._answer_id = answer_id
        self._endpoint = endpoint
        self._received_s = received_s
        self._tokenized_s = received_s
        self._asked_keys = headers.getlist(KEY_HEADER)
        self._claim_name: ClaimName | None = None
        self._claim: Claim | None = None
        self._asked_timeouts = headers.getlist(TIMEOUT_HEADER)
        self._deadline_s = received_s + self._section.request_deadline_s
        self._asked_sessions = headers.getlist(SESSION_HEADER)
        self._traceparent = headers.get("traceparent", "")
        self._cache_salt = cache_salt(headers.get("authorization") or headers.get("x-api-key", ""))
        self._flights: list[Flight] = []
        self._watcher: asyncio.Task[None] | None = None

    async def body(self, request: Request) -> bytes:
        """Raises RequestError for a body that is too large and for a header that is none."""
        body = await read_body(request, self._section.max_body_bytes)
        key = asked_key(self._asked_keys)
        if key is not None:
            owner = f"{self._gateway.boot_id}/{self._answer_id}"
            self._claim_name = claim_name(self._cache_salt, request.url.path, key, body, owner)
        return body

    def template(self, common: CommonFields) -> GenerationRequest:
        """What all generation requests of this call share. Raises RequestError for a timeout that is none."""
        self._deadline_s = self._received_s + allowed_s(asked_timeout_s(self._asked_timeouts), self._section.request_deadline_s)
        return GenerationRequest(
            request_id=self._answer_id,
            prompt_ids=(),
            sampling=_NO_SAMPLING,
            num_choices=common.answer.num_choices,
            stop=common.stop,
            received_s=self._received_s,
            deadline_s=self._deadline_s,
            traceparent=self._traceparent,
            cache_salt=salted(self._cache_salt, common.cache_salt),
            session=session_of(asked_session(self._asked_sessions), common.cache_key, self._cache_salt),
            endpoint=self._endpoint,
        )

    def head(self, common: CommonFields, requests: Sequence[GenerationRequest]) -> AnswerHead:
        """What all objects of this call's answer share."""
        return AnswerHead(
            answer_id=self._answer_id,
            model=self._gateway.card.name,
            text=self._gateway.text,
            shows_logprobs=common.answer.shows_logprobs,
            shows_token_ids=common.answer.return_token_ids,
            includes_usage=common.answer.include_usage,
            counted_prompts=tuple(len(made.prompt_ids) for made in requests) if common.answer.counts_each else (),
        )

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """A call refused before anything was submitted still has its span and its count."""
        try:
            yield
        except DuomoError as error:
            self._refuse(error)
            raise
        except RecursionError as error:  # of whichever step looks into the body: parsing took it, a template or a schema does not
            refusal = RequestError("The body nests too deeply.", param="body")
            self._refuse(refusal)
            raise refusal from error

    async def answer(self, request: Request, requests: list[GenerationRequest], common: CommonFields, shape: AnswerShape) -> Response:
        """Submit everything and answer. Raises the DuomoError of whatever failed before the first byte."""
        delays = self._gateway.config.delays
        if delays.gateway_tokenize_s:
            await asyncio.sleep(delays.gateway_tokenize_s)
        with self.refusing():
            await self._check_structure(common)
            self._tokenized_s = time.monotonic()
            kept = await self._claim_key()
        if kept is not None:
            return self._replay(kept, request)
        try:
            if delays.gateway_route_s:
                await asyncio.sleep(delays.gateway_route_s)
            if common.answer.stream:
                return self._recorded(await self._stream(request, requests, common, shape))
            response = await self._whole(request, requests, common, shape)
            if self._claim is not None:
                await self._claim.keep_whole(response)
            return response
        except BaseException as error:
            if self._claim is not None:
                await self._claim.failed(error, lambda fault: refusal_of(request, fault))
            raise

    async def _whole(self, request: Request, requests: list[GenerationRequest], common: CommonFields, shape: AnswerShape) -> Response:
        sink = WholeSink(len(requests), _wants_pieces(common))
        try:
            self._submit(request, requests, sink)
            body = await sink.gather(shape)
            return Response(body, media_type="application/json", headers=self._headers())
        finally:
            self._close(sink)

    async def _stream(
        self, request: Request, requests: list[GenerationRequest], common: CommonFields, shape: AnswerShape
    ) -> StreamResponse:
        """Waits for the first token, so that a refusal can still be a status; the response sends the rest and closes."""
        transport = _transport_of(request)
        sink = StreamSink(
            len(requests),
            _wants_pieces(common),
            shape,
            max_behind_bytes=self._section.slow_client_bytes,
            transport=transport,
            on_behind=lambda: self._cut_off(transport),
        )
        is_handed_over = False
        try:
            self._submit(request, requests, sink)
            await sink.first()
            is_handed_over = True
            delay_s = self._gateway.config.delays.gateway_emit_s
            return StreamResponse(sink, self._headers(), lambda: self._close(sink), delay_s)
        finally:
            if not is_handed_over:
                self._close(sink)

    async def _check_structure(self, common: CommonFields) -> None:
        """Within the request's time, too. Raises DeadlineError where that ends first."""
        left_s = self._deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(max(left_s, 0.0)):
                await check_structure(common.structure)
        except TimeoutError as error:
            raise DeadlineError(f"The request was not finished within {self._deadline_s - self._received_s:g} s.") from error

    async def _claim_key(self) -> StoredAnswer | None:
        """The call's idempotency key is ours, if it has one, or its answer is there. Raises the error of one that is in use, or misused."""
        if self._claim_name is None:
            return None
        if self._idempotency is None:
            raise CapacityError("This gateway keeps no answers for an 'Idempotency-Key'.", code="idempotency_unavailable", phase="gateway")
        found = await self._idempotency.begin(self._claim_name, self._deadline_s)
        if isinstance(found, StoredAnswer):
            return found
        self._claim = found
        return None

    def _recorded(self, response: StreamResponse) -> Response:
        return response if self._claim is None else RecordedResponse(response, self._claim)

    def _replay(self, kept: StoredAnswer, request: Request) -> Response:
        """Nothing is generated: a span of its own, and no request counted beside the first."""
        span = self._gateway.accounting.start_span(self._traceparent, self._endpoint, self._received_s)
        span.set({"duomo.replayed": True})
        span.end()
        return ReplayedResponse(kept, self._deadline_s, _transport_of(request))

    def _headers(self) -> dict[str, str]:
        """The answer's id where OpenAI's and where Anthropic's clients look for it; to whom asked for a time, what it was given."""
        headers = {"x-request-id": self._answer_id, "request-id": self._answer_id}
        if self._asked_timeouts:
            headers[TIMEOUT_HEADER] = f"{self._deadline_s - self._received_s:g}"
        return headers

    def _submit(self, request: Request, requests: list[GenerationRequest], sink: WholeSink | StreamSink) -> None:
        tokenize_s = self._tokenized_s - self._received_s
        for made in requests:
            span = self._gateway.accounting.start_span(self._traceparent, self._endpoint, self._received_s)
            try:
                flight = self._gateway.submit(replace(made, tokenize_s=tokenize_s), sink, span)
            except DuomoError as error:
                self._gateway.accounting.refuse(span, error)
                raise
            self._flights.append(flight)
        self._watcher = asyncio.get_running_loop().create_task(watch_client(request.receive, sink))

    def _close(self, sink: Sink) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # it holds the sink, which holds us
        flights, self._flights = self._flights, []
        for flight in flights:
            self._gateway.close(flight, sink.error if isinstance(sink.error, RequestCancelled) else None)

    def _cut_off(self, transport: ClientTransport | None) -> None:
        """The client is too far behind: stop generating now, and do not wait for its socket to take what is buffered."""
        log.info("request %s: the client reads too slowly and is cut off", self._answer_id)
        self._gateway.metrics.slow_clients.inc()
        for flight in self._flights:
            asyncio.get_running_loop().call_soon(self._gateway.cancel, flight, "The client reads too slowly.")
        if transport is not None:
            transport.abort()

    def _refuse(self, error: DuomoError) -> None:
        accounting = self._gateway.accounting
        accounting.refuse(accounting.start_span(self._traceparent, self._endpoint, self._received_s), error)


def _transport_of(request: Request) -> ClientTransport | None:
    extensions = request.scope.get("extensions") or {}
    transport: ClientTransport | None = extensions.get(TRANSPORT_EXTENSION)
    return transport


def _wants_pieces(common: CommonFields) -> bool:
    return common.sampling.logprobs is not None or common.answer.return_token_ids or common.answer.counts_each
