"""What is recorded when a request is over: its spans, parts and metrics. Knows no socket; reads a Flight's milestones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from duomo.errors import DuomoError, RequestCancelled
from duomo.telemetry.metrics import Metrics
from duomo.telemetry.parts import GatewayTimes, Parts, second_token_parts, ttft_parts
from duomo.telemetry.tracing import Span, Tracing
from duomo.telemetry.waterfall import part_attributes
from services.router.flight import Flight, Milestones


@dataclass(frozen=True, slots=True)
class Accounting:
    """One process' spans and metrics, for one model's requests. clock: monotonic seconds."""

    tracing: Tracing
    metrics: Metrics
    model_name: str
    clock: Callable[[], float]

    def start_span(self, traceparent: str, endpoint: str, received_s: float) -> Span:
        """gateway.request, from the moment the request was read. Whoever submits the request has it ended by `settle` or `refuse`."""
        attributes = {"gen_ai.request.model": self.model_name, "gen_ai.operation.name": endpoint}
        return self.tracing.start_span("gateway.request", traceparent or None, attributes, start_s=received_s)

    def refuse(self, span: Span, error: DuomoError) -> None:
        """A request that never flew."""
        self.metrics.requests.labels(_outcome(error, "refused"), error.code).inc()
        span.fail(error)
        span.end()

    def settle(self, flight: Flight, error: DuomoError | None) -> None:
        """A request whose answer is with the client, or never will be. Ends its span."""
        request, milestones, metrics = flight.request, flight.milestones, self.metrics
        now_s = self.clock()
        code = "" if error is None else error.code
        metrics.requests.labels(_outcome(error, "failed"), code).inc()
        metrics.request_duration.labels(self.model_name, code).observe(now_s - request.received_s)
        num_tokens = flight.num_completion_tokens()
        metrics.tokens.labels("prompt").inc(len(request.prompt_ids))
        metrics.tokens.labels("cached").inc(flight.cached_tokens or 0)
        metrics.tokens.labels("completion").inc(num_tokens)
        longest = max(len(choice.emitted) for choice in flight.choices)
        first_s = flight.sink.first_sent_s or milestones.first_delivered_s
        if longest:
            metrics.time_to_first_token.labels(self.model_name).observe(first_s - request.received_s)
        if longest > 1:
            per_token_s = (milestones.last_s - milestones.first_delivered_s) / (longest - 1)
            metrics.time_per_output_token.labels(self.model_name).observe(per_token_s)
        self._trace(flight, first_s)
        flight.span.set(
            {
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
                "gen_ai.usage.output_tokens": num_tokens,
                "duomo.cached_tokens": flight.cached_tokens or 0,
                **_route(milestones),
                "duomo.retries": milestones.num_retries,
                "duomo.resumes": milestones.num_resumes,
            }
        )
        if error is not None:
            flight.span.fail(error)
        flight.span.end(at_s=now_s)

    def _trace(self, flight: Flight, first_s: float) -> None:
        request, milestones, parent = flight.request, flight.milestones, flight.span.traceparent
        tokenized_s = request.received_s + request.tokenize_s
        self.tracing.record_span("gateway.tokenize", parent, request.received_s, tokenized_s)
        if milestones.sent_s:
            self.tracing.record_span("gateway.route", parent, tokenized_s, milestones.sent_s, _route(milestones))
        if milestones.prefill_timings is None or not first_s:
            return
        is_coalesced = milestones.second_delivered_s <= first_s
        second_s = first_s if is_coalesced else flight.sink.second_sent_s or milestones.second_delivered_s
        times = GatewayTimes(
            received_s=request.received_s,
            tokenized_s=tokenized_s,
            routed_s=milestones.sent_s,
            first_read_s=milestones.first_received_s,
            first_emitted_s=first_s,
            second_read_s=milestones.second_received_s,
            second_emitted_s=max(second_s, first_s),
        )
        self._observe(flight.span, "ttft", ttft_parts(times, milestones.prefill_timings, milestones.rtts))
        if milestones.decode_timings is not None and milestones.second_received_s:
            self._observe(flight.span, "second_token", second_token_parts(times, milestones.decode_timings, milestones.rtts))

    def _observe(self, span: Span, interval: str, parts: Parts) -> None:
        self.metrics.observe_parts(interval, parts)
        if span.is_recording:
            span.set(part_attributes(interval, parts))


def _route(milestones: Milestones) -> dict[str, str | int]:
    """Why the pair of the last attempt was chosen, and what prefill was thought to know of the prompt."""
    return {
        "duomo.route_reason": milestones.reason,
        "duomo.route_decode_reason": milestones.decode_reason,
        "duomo.route_known_tokens": milestones.known_tokens,
    }


def _outcome(error: DuomoError | None, otherwise: str) -> str:
    if error is None:
        return "ok"
    return "cancelled" if isinstance(error, RequestCancelled) else otherwise
