"""Every Prometheus metric of Duomo, by name, in one place. Owns one registry for each process; knows no service.

Names follow OpenTelemetry's GenAI conventions where they exist (gen_ai.server.time_to_first_token is
gen_ai_server_time_to_first_token_seconds in Prometheus) and are duomo_* otherwise. docs/metrics.md explains each.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from duomo.errors import WireError
from duomo.telemetry.expert_loads import ExpertLoads
from duomo.telemetry.grown_counts import GrownCounts
from duomo.telemetry.handoff_histograms import HandoffHistograms, is_part
from duomo.telemetry.parts import Parts
from duomo.wire.histogram import unpacked
from duomo.wire.messages import ReplicaReport

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0)
_TOKEN_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_REQUEST_BUCKETS_S: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92, 163.84, 327.68)
_PHASE_BUCKETS_S: Final = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REPLICA: Final = ("role", "replica")
_PREFILL_COUNTS: Final = ("prefill_tokens_computed", "prefill_tokens_cached", "expert_bytes_read")

log = logging.getLogger(__name__)


class _WithoutCreated(Collector):
    """A registry less the `_created` series, which double its size and which no dashboard asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _ExpertGauges(Collector):
    """A few figures a pool and layer, made when they are scraped: a series for each expert would be thousands (/admin/experts)."""

    def __init__(self, experts: ExpertLoads) -> None:
        self._experts = experts

    def collect(self) -> Iterator[Metric]:
        labels = ("pool", "layer")
        imbalance = GaugeMetricFamily(
            "duomo_expert_load_imbalance", "Tokens of the busiest expert over the mean, of the last minute", labels=labels
        )
        active = GaugeMetricFamily("duomo_active_experts", "Experts with any token in the last minute", labels=labels)
        top = GaugeMetricFamily("duomo_top_expert", "Number of the busiest expert of the last minute", labels=labels)
        entropy = GaugeMetricFamily("duomo_router_entropy", "Entropy of the last minute's routing in nats", labels=labels)
        for pool, loads in self._experts.pools().items():
            for family, value_L in (
                (imbalance, loads.imbalance_L),
                (active, loads.active_L),
                (top, loads.top_L),
                (entropy, loads.entropy_L),
            ):
                for layer, value in enumerate(value_L.tolist()):
                    family.add_metric((pool, str(layer)), value)
        yield from (imbalance, active, top, entropy)


class Metrics:
    """One process' metrics. Counters and histograms are public: `metrics.requests.labels("ok", "").inc()`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._make_request_metrics(self.registry)
        self._make_pool_metrics(self.registry)
        self.experts = ExpertLoads()
        self.registry.register(_ExpertGauges(self.experts))
        self.handoffs = HandoffHistograms()
        self.registry.register(self.handoffs)
        self._replicas: dict[str, str] = {}
        self.counted = GrownCounts()

    def _make_request_metrics(self, registry: CollectorRegistry) -> None:
        self.time_to_first_token = Histogram(
            "gen_ai_server_time_to_first_token_seconds",
            "From the request read to its first token handed to the client's socket",
            ("gen_ai_request_model",),
            registry=registry,
            buckets=_TTFT_BUCKETS_S,
        )
        self.time_per_output_token = Histogram(
            "gen_ai_server_time_per_output_token_seconds",
            "Mean time between tokens of one choice after its first",
            ("gen_ai_request_model",),
            registry=registry,
            buckets=_TOKEN_BUCKETS_S,
        )
        self.request_duration = Histogram(
            "gen_ai_server_request_duration_seconds",
            "From the request read to its answer's end",
            ("gen_ai_request_model", "error_type"),
            registry=registry,
            buckets=_REQUEST_BUCKETS_S,
        )
        self.phase = Histogram(
            "duomo_phase_seconds",
            "Parts of the time to the first and second token",
            ("phase",),
            registry=registry,
            buckets=_PHASE_BUCKETS_S,
        )
        self.unaccounted = Histogram(
            "duomo_unaccounted_seconds",
            "Size of what no part accounts for",
            ("interval",),
            registry=registry,
            buckets=_PHASE_BUCKETS_S,
        )
        self.requests = Counter("duomo_requests", "Requests ended, by outcome and error code", ("outcome", "code"), registry=registry)
        self.live_requests = Gauge("duomo_live_requests", "Requests admitted and not ended", registry=registry)
        self.queued_requests = Gauge("duomo_queued_requests", "Requests waiting for admission", registry=registry)
        self.tokens = Counter("duomo_tokens", "Tokens: prompt, cached (of the prompt), completion", ("kind",), registry=registry)
        self.route_reasons = Counter("duomo_route_reasons", "Replicas chosen, by reason", ("pool", "reason"), registry=registry)
        self.retries = Counter(
            "duomo_retries", "Attempts begun before the first token, by the failure's code", ("code",), registry=registry
        )
        self.breakers_opened = Counter(
            "duomo_breakers_opened", "Circuit breakers that opened: a replica's (leg) or a pair's", ("kind",), registry=registry
        )
        self.resumes = Counter("duomo_resumes", "Attempts begun after the first token, by cause", ("cause",), registry=registry)
        self.idempotency = Counter(
            "duomo_idempotency", "What became of requests with an idempotency key, and of kept answers", ("event",), registry=registry
        )
        self.idempotency_bytes = Gauge(
            "duomo_idempotency_bytes", "Kept answers of all gateways, when this one last kept one", registry=registry
        )
        self.slow_clients = Counter("duomo_slow_clients", "Clients cut off for reading too slowly", registry=registry)
        self.admin_actions = Counter(
            "duomo_admin_actions", "Calls of the admin API that would change something", ("action", "result"), registry=registry
        )

    def _make_pool_metrics(self, registry: CollectorRegistry) -> None:
        self.replica_blocks = Gauge("duomo_replica_blocks", "KV blocks: total, free, cached", (*_REPLICA, "state"), registry=registry)
        self.replica_slots = Gauge(
            "duomo_replica_slots", "Landing slots: total, free, quarantined", (*_REPLICA, "state"), registry=registry
        )
        self.replica_requests = Gauge("duomo_replica_requests", "Requests: running, queued", (*_REPLICA, "state"), registry=registry)
        self.replica_queued_tokens = Gauge("duomo_replica_queued_tokens", "Prompt tokens waiting", _REPLICA, registry=registry)
        self.replica_prefixes = Gauge(
            "duomo_replica_prefixes", "Prefixes of prompts that the replica tells routers of; bounded", _REPLICA, registry=registry
        )
        self.replica_steps = Gauge("duomo_replica_steps", "Engine steps since the replica's start", _REPLICA, registry=registry)
        self.replica_progress_age = Gauge(
            "duomo_replica_progress_age_seconds", "Time since the last step's end while there is work", _REPLICA, registry=registry
        )
        self.replica_draining = Gauge("duomo_replica_draining", "1 while the replica takes no new request", _REPLICA, registry=registry)
        self.replica_counters = Gauge(
            "duomo_replica_counter", "The replica's own event counts, as it reports them", (*_REPLICA, "counter"), registry=registry
        )
        self.prefill_tokens = Counter(
            "duomo_prefill_tokens", "Prompt tokens of prefill: computed, cached (found in its prefix cache)", ("kind",), registry=registry
        )
        self.prefill_expert_bytes = Counter(
            "duomo_prefill_expert_bytes", "Bytes of expert weights that prefill's waves read", registry=registry
        )
        self.desired_replicas = Gauge(
            "duomo_desired_replicas", "Replicas that the gateway's load of this moment would need", ("pool",), registry=registry
        )

    def observe_parts(self, interval: str, parts: Parts) -> None:
        """One request's parts; interval is "ttft" or "second_token"."""
        for phase, part_s in parts.parts_s:
            self.phase.labels(phase).observe(max(part_s, 0.0))
        self.unaccounted.labels(interval).observe(abs(parts.unaccounted_s))

    def observe_report(self, report: ReplicaReport) -> None:
        """A replica's last report becomes its gauges."""
        who = (report.role, report.replica_id)
        self._replicas[report.replica_id] = report.role
        self.replica_blocks.labels(*who, "total").set(report.num_blocks)
        self.replica_blocks.labels(*who, "free").set(report.num_free_blocks)
        self.replica_blocks.labels(*who, "cached").set(report.num_cached_blocks)
        self.replica_slots.labels(*who, "total").set(report.num_slots)
        self.replica_slots.labels(*who, "free").set(report.num_free_slots)
        self.replica_slots.labels(*who, "quarantined").set(report.num_quarantined_slots)
        self.replica_requests.labels(*who, "running").set(report.num_running)
        self.replica_requests.labels(*who, "queued").set(report.num_queued)
        self.replica_queued_tokens.labels(*who).set(report.num_queued_tokens)
        self.replica_prefixes.labels(*who).set(len(report.prefix_digests))
        self.replica_steps.labels(*who).set(report.num_steps)
        self.replica_progress_age.labels(*who).set(report.progress_age_s)
        self.replica_draining.labels(*who).set(report.is_draining)
        for counter, count in report.counters.items():
            if not is_part(counter):
                self.replica_counters.labels(*who, counter).set(count)
        self.handoffs.observe(report)
        if report.role == "prefill":
            counts = {name: report.counters.get(name, 0) for name in _PREFILL_COUNTS}
            new = self.counted.grown(report.replica_id, report.boot_id, counts)
            self.prefill_tokens.labels("computed").inc(new["prefill_tokens_computed"])
            self.prefill_tokens.labels("cached").inc(new["prefill_tokens_cached"])
            self.prefill_expert_bytes.inc(new["expert_bytes_read"])
        if report.experts is not None:
            try:
                self.experts.observe(report.role, report.replica_id, unpacked(report.experts), time.monotonic())
            except WireError as error:
                log.warning("%s reports experts that cannot be read: %s", report.replica_id, error.detail)

    def forget_replica(self, replica_id: str) -> None:
        """A replica that is gone leaves no gauge behind."""
        self.experts.forget(replica_id)
        self.handoffs.forget(replica_id)
        self.counted.forget(replica_id)
        role = self._replicas.pop(replica_id, None)
        if role is None:
            return
        who = {"role": role, "replica": replica_id}
        for gauge in (
            self.replica_blocks,
            self.replica_slots,
            self.replica_requests,
            self.replica_queued_tokens,
            self.replica_prefixes,
            self.replica_steps,
            self.replica_progress_age,
            self.replica_draining,
            self.replica_counters,
        ):
            gauge.remove_by_labels(who)

    def render(self) -> bytes:
        """The text format that Prometheus scrapes; send it as CONTENT_TYPE."""
        return generate_latest(_WithoutCreated(self.registry))
