"""Metrics: names as documented, reports as gauges, nothing shared between two processes' objects."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from duomo.telemetry.grown_counts import KEPT_GONE
from duomo.telemetry.handoff_histograms import HANDOFF_BYTES, HANDOFF_SECONDS
from duomo.telemetry.metrics import Metrics
from duomo.telemetry.parts import Parts
from duomo.wire.histogram import packed
from duomo.wire.messages import ReplicaReport
from duomo.wire.values import ExpertHistogram

REPORT = ReplicaReport(
    replica_id="decode-1",
    boot_id="00000000000000d1",
    role="decode",
    is_draining=True,
    num_running=3,
    num_queued=1,
    num_queued_tokens=257,
    num_blocks=2048,
    num_free_blocks=2000,
    num_cached_blocks=40,
    num_slots=32,
    num_free_slots=31,
    num_quarantined_slots=1,
    num_open_handles=1,
    num_open_spans=2,
    num_steps=100_000,
    block_tokens=16,
    prefix_digests=(2**63, 7, 1),
    counters={"preemptions": 2},
    progress_age_s=0.5,
)


def scraped(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """(name, label values in alphabetical order...) -> value, as Prometheus would read them."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_counters_and_histograms_are_scraped_under_their_names() -> None:
    metrics = Metrics()
    metrics.requests.labels("failed", "replica_lost").inc()
    metrics.time_to_first_token.labels("tiny-moe").observe(0.07)
    metrics.observe_parts("ttft", Parts(total_s=0.05, parts_s=(("wire", 0.010), ("prefill.compute", 0.0385))))
    seen = scraped(metrics)
    assert seen["duomo_requests_total", "failed", "replica_lost"] == 1
    assert seen["gen_ai_server_time_to_first_token_seconds_bucket", "0.08", "tiny-moe"] == 1
    assert seen["gen_ai_server_time_to_first_token_seconds_bucket", "0.06", "tiny-moe"] == 0
    assert seen["duomo_phase_seconds_sum", "prefill.compute"] == 0.0385
    assert seen["duomo_unaccounted_seconds_bucket", "0.0025", "ttft"] == 1
    assert ("process_resident_memory_bytes",) in seen
    assert not [key for key in seen if key[0].endswith("_created")]


def test_a_report_becomes_gauges_that_vanish_with_the_replica() -> None:
    metrics = Metrics()
    metrics.observe_report(REPORT)
    seen = scraped(metrics)
    assert seen["duomo_replica_blocks", "decode", "decode-1", "free"] == 2000
    assert seen["duomo_replica_slots", "decode", "decode-1", "quarantined"] == 1
    assert seen["duomo_replica_requests", "decode", "decode-1", "running"] == 3
    assert seen["duomo_replica_counter", "decode", "decode-1", "preemptions"] == 2
    assert seen["duomo_replica_draining", "decode", "decode-1"] == 1
    assert seen["duomo_replica_prefixes", "decode", "decode-1"] == 3
    assert seen["duomo_replica_progress_age_seconds", "decode", "decode-1"] == 0.5
    metrics.forget_replica("decode-1")
    metrics.forget_replica("decode-1")
    assert not any("decode-1" in key for key in scraped(metrics))


def prefill_report(boot_id: str, computed: int, cached: int, expert_bytes: int) -> ReplicaReport:
    counters = {"prefill_tokens_computed": computed, "prefill_tokens_cached": cached, "expert_bytes_read": expert_bytes}
    return msgspec.structs.replace(REPORT, replica_id="prefill-0", boot_id=boot_id, role="prefill", counters=counters)


def test_prefills_counts_grow_over_reports_and_starts_and_never_shrink() -> None:
    metrics = Metrics()
    for report in (
        prefill_report("a", 100, 10, 5_000),
        prefill_report("a", 100, 10, 5_000),
        prefill_report("a", 150, 20, 7_000),
        prefill_report("b", 30, 1, 400),
    ):
        metrics.observe_report(report)
        metrics.forget_replica("prefill-0")  # its socket broke: it may be back
    seen = scraped(metrics)
    assert seen["duomo_prefill_tokens_total", "computed"] == 180
    assert seen["duomo_prefill_tokens_total", "cached"] == 21
    assert seen["duomo_prefill_expert_bytes_total",] == 7_400


def test_replicas_that_restart_under_new_ids_are_not_kept_for_ever() -> None:
    metrics = Metrics()
    for number in range(3 * KEPT_GONE):
        metrics.observe_report(msgspec.structs.replace(prefill_report("a", 1, 0, 0), replica_id=f"prefill-{number}"))
        metrics.forget_replica(f"prefill-{number}")
    assert len(metrics.counted) == KEPT_GONE
    assert scraped(metrics)["duomo_prefill_tokens_total", "computed"] == 3 * KEPT_GONE


def test_experts_are_a_few_series_a_layer_that_vanish_with_their_replicas() -> None:
    metrics = Metrics()
    for counts in ([[0] * 128] * 48, [[2] + [1] * 127] * 48):
        metrics.observe_report(msgspec.structs.replace(REPORT, experts=packed(np.array(counts, np.int64))))
    seen = scraped(metrics)
    assert seen["duomo_active_experts", "47", "decode"] == 128 and seen["duomo_top_expert", "0", "decode"] == 0
    assert abs(seen["duomo_expert_load_imbalance", "0", "decode"] - 2 * 128 / 129) < 1e-9
    assert 4.8 < seen["duomo_router_entropy", "0", "decode"] < 4.86
    assert (
        sum("decode" in key and key[0].startswith(("duomo_active", "duomo_top", "duomo_expert", "duomo_router")) for key in seen) == 4 * 48
    )
    metrics.observe_report(REPORT)
    assert scraped(metrics)["duomo_active_experts", "47", "decode"] == 128, "a report without a histogram changes none"
    metrics.forget_replica("decode-1")
    assert not any("decode" in key for key in scraped(metrics))


def test_a_histogram_that_cannot_be_read_costs_nothing_else() -> None:
    metrics = Metrics()
    metrics.observe_report(msgspec.structs.replace(REPORT, experts=ExpertHistogram(num_layers=2, num_experts=2, counts=b"x")))
    assert scraped(metrics)["duomo_replica_steps", "decode", "decode-1"] == 100_000 and not metrics.experts.pools()


def test_two_registries_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.slow_clients.inc()
    assert scraped(first)["duomo_slow_clients_total",] == 1
    assert scraped(second)["duomo_slow_clients_total",] == 0


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = set(re.findall(r"^\| `((?:duomo|gen_ai)_\w+)`", page, flags=re.MULTILINE))
    made = {family.name for family in Metrics().registry.collect() if not family.name.startswith("process_")}
    assert documented == made


def test_handoffs_of_all_replicas_are_one_histogram_a_transport() -> None:
    metrics = Metrics()

    def report(replica: str, boot_id: str, transport: str, *handoffs: tuple[float, float]) -> ReplicaReport:
        counters: Counter[str] = Counter(preemptions=1)
        for num_bytes, took_s in handoffs:
            HANDOFF_BYTES.count(num_bytes, counters)
            HANDOFF_SECONDS.count(took_s, counters)
        return msgspec.structs.replace(REPORT, replica_id=replica, boot_id=boot_id, transport=transport, counters=dict(counters))

    for told in (
        report("d0", "a", "nixl/UCX", (65536, 0.004)),
        report("d0", "a", "nixl/UCX", (65536, 0.004), (3_000_000, 0.02)),
        report("d1", "b", "nixl/UCX", (1 << 40, 99.0)),
        report("d2", "c", "loopback", (0, 0.0)),
    ):
        metrics.observe_report(told)
    metrics.forget_replica("d0")
    metrics.observe_report(report("d0", "restarted", "nixl/UCX", (65537, 0.005)))
    seen = scraped(metrics)
    of_bytes = {key[1]: value for key, value in seen.items() if key[0] == "duomo_handoff_bytes_bucket" and key[2] == "nixl/UCX"}
    assert (of_bytes["65536"], of_bytes["262144"], of_bytes["4194304"], of_bytes["17179869184"], of_bytes["+Inf"]) == (1, 2, 3, 3, 4)
    assert seen["duomo_handoff_bytes_sum", "nixl/UCX"] == 65536 + 3_000_000 + (1 << 40) + 65537
    assert seen["duomo_handoff_seconds_count", "nixl/UCX"] == 4 and seen["duomo_handoff_seconds_count", "loopback"] == 1
    assert abs(seen["duomo_handoff_seconds_sum", "nixl/UCX"] - 99.029) < 1e-9
    assert seen["duomo_handoff_seconds_bucket", "0.005", "nixl/UCX"] == 2
    assert not [key for key in seen if key[0] == "duomo_replica_counter" and "handoff" in "".join(key)], (
        "parts are no counters of their own"
    )
