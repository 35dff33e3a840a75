"""Parts that add up: a delay planted anywhere is found in its own part and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import pytest

from duomo.telemetry.parts import GatewayTimes, Parts, Rtts, second_token_parts, ttft_parts
from duomo.wire.values import Timings

DELAY_S = 0.020


@dataclass(frozen=True, kw_only=True)
class Request:
    """True durations of one request, in seconds; from them the timestamps that the three processes would take."""

    tokenize_s: float = 0.0011
    route_s: float = 0.0007
    wire_to_p_s: float = 0.0002
    wire_to_d_s: float = 0.0003
    wire_between_s: float = 0.0004
    queue_s: float = 0.0030
    compute_s: float = 0.0170
    sample_s: float = 0.0013
    post_s: float = 0.0002
    emit_s: float = 0.0005
    handoff_s: float = 0.0021
    admit_s: float = 0.0017
    first_step_s: float = 0.0063
    second_emit_s: float = 0.0004
    lost_at_p_s: float = 0.0
    lost_at_d_s: float = 0.0

    def observe(self) -> tuple[Parts, Parts]:
        received_s = 1000.0
        tokenized_s = received_s + self.tokenize_s
        routed_s = tokenized_s + self.route_s
        sampled_s = routed_s + self.wire_to_p_s + self.queue_s + self.compute_s + self.sample_s
        sampled_s += self.post_s + self.lost_at_p_s
        first_read_s = sampled_s + self.wire_to_p_s
        at_d_s = sampled_s + self.wire_between_s + self.handoff_s + self.admit_s + self.first_step_s + self.lost_at_d_s
        second_read_s = at_d_s + self.wire_to_d_s
        times = GatewayTimes(
            received_s=received_s,
            tokenized_s=tokenized_s,
            routed_s=routed_s,
            first_read_s=first_read_s,
            first_emitted_s=first_read_s + self.emit_s,
            second_read_s=second_read_s,
            second_emitted_s=second_read_s + self.second_emit_s,
        )
        total_s = self.queue_s + self.compute_s + self.sample_s + self.post_s
        prefill = Timings(total_s=total_s, queue_s=self.queue_s, compute_s=self.compute_s, sample_s=self.sample_s)
        decode = Timings(
            total_s=1.0,
            handoff_exposed_s=self.handoff_s,
            admit_s=self.admit_s,
            first_step_s=self.first_step_s,
            peer_rtt_s=2 * self.wire_between_s,
        )
        rtts = Rtts(prefill_s=2 * self.wire_to_p_s, decode_s=2 * self.wire_to_d_s)
        return ttft_parts(times, prefill, rtts), second_token_parts(times, decode, rtts)


PLACES = [
    ("tokenize_s", "gateway.tokenize", None),
    ("route_s", "gateway.route", None),
    ("queue_s", "prefill.queue", None),
    ("compute_s", "prefill.compute", None),
    ("sample_s", "prefill.compute", None),
    ("post_s", "prefill.emit", None),
    ("emit_s", "gateway.emit", "gateway.emit"),
    ("handoff_s", None, "kv.handoff"),
    ("admit_s", None, "decode.admit"),
    ("first_step_s", None, "decode.first_step"),
    ("second_emit_s", None, "gateway.emit"),
    ("wire_to_p_s", "wire", "wire"),
    ("wire_to_d_s", None, "wire"),
    ("wire_between_s", None, "wire"),
    ("lost_at_p_s", "unaccounted", None),
    ("lost_at_d_s", None, "unaccounted"),
]


def test_every_place_of_the_model_is_tried() -> None:
    assert {place for place, _, _ in PLACES} == {field.name for field in fields(Request)}


@pytest.mark.parametrize(("place", "ttft_part", "second_part"), PLACES)
def test_a_planted_delay_is_found_in_its_part_and_nowhere_else(place: str, ttft_part: str | None, second_part: str | None) -> None:
    plain, slow = Request(), replace(Request(), **{place: getattr(Request(), place) + DELAY_S})
    for before, after, part in zip(plain.observe(), slow.observe(), (ttft_part, second_part), strict=True):
        grown = {
            name: after.with_unaccounted()[name] - before.with_unaccounted()[name]
            for name in before.with_unaccounted()
            if abs(after.with_unaccounted()[name] - before.with_unaccounted()[name]) > 1e-9
        }
        assert list(grown) == ([part] if part else [])
        assert abs(after.total_s - before.total_s - sum(grown.values())) < 1e-9
        assert after.adds_up == (part != "unaccounted")
        if part not in (None, "wire", "gateway.emit"):
            assert grown[part] == pytest.approx(DELAY_S)


def test_parts_and_unaccounted_sum_to_the_total() -> None:
    for parts in replace(Request(), lost_at_p_s=0.003, lost_at_d_s=-0.002).observe():
        assert sum(parts.with_unaccounted().values()) == pytest.approx(parts.total_s)
        assert list(parts.with_unaccounted())[-1] == "unaccounted"


def test_the_bound_is_the_larger_of_1_ms_and_2_percent_either_way() -> None:
    for total_s, lost_s, adds_up in (
        (0.01, 0.0009, True),
        (0.01, 0.0011, False),
        (1.0, 0.019, True),
        (1.0, 0.021, False),
        (1.0, -0.021, False),
    ):
        assert Parts(total_s=total_s, parts_s=(("wire", total_s - lost_s),)).adds_up == adds_up
