"""Histograms over a moving window: what is even, what is not, and what a replica's end and new start do."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from duomo.telemetry.expert_loads import MARK_PERIOD_S, WINDOW_S, ExpertLoads
from duomo.telemetry.expert_tokens import REPORT_PERIOD_S, ExpertTokens
from duomo.wire.histogram import unpacked

ZERO = np.zeros((2, 4), np.int64)


def test_a_layer_is_judged_by_what_came_since_the_window_began() -> None:
    loads = ExpertLoads()
    loads.observe("prefill", "p0", ZERO + 1000, 0.0)  # before this gateway looked
    loads.observe("prefill", "p0", ZERO + 1000 + np.array([[6, 1, 1, 0], [5, 5, 5, 5]]), 2.0)
    (found,) = loads.pools().values()
    assert found.window_LE.tolist() == [[6, 1, 1, 0], [5, 5, 5, 5]] and found.total_LE.sum() == 8 * 1000 + 28
    assert found.imbalance_L.tolist() == [3.0, 1.0] and found.active_L.tolist() == [3, 4] and found.top_L.tolist() == [0, 0]
    assert found.entropy_L[1] == pytest.approx(math.log(4)) and 0 < found.entropy_L[0] < math.log(4)
    assert found.window_s == 2.0 and json.loads(json.dumps(found.as_json()))["window_tokens"][0] == [6, 1, 1, 0]


def test_without_tokens_every_figure_is_nought() -> None:
    loads = ExpertLoads()
    loads.observe("decode", "d0", ZERO, 0.0)
    found = loads.pools()["decode"]
    assert not found.imbalance_L.any() and not found.active_L.any() and not found.top_L.any() and not found.entropy_L.any()
    assert not np.signbit(found.entropy_L).any() and not ExpertLoads().pools()


def test_the_window_moves_and_keeps_few_marks() -> None:
    loads = ExpertLoads()
    for second in range(0, 400, 2):
        loads.observe("prefill", "p0", ZERO + second, float(second))
        found = loads.pools()["prefill"]
        assert found.window_s == second if second <= WINDOW_S else WINDOW_S <= found.window_s <= WINDOW_S + MARK_PERIOD_S
        assert found.window_LE[0, 0] == found.window_s
    assert len(loads._replicas["p0"].marks) <= WINDOW_S / MARK_PERIOD_S + 2


def test_replicas_of_a_pool_are_summed_and_leave_with_their_counts() -> None:
    loads = ExpertLoads()
    for replica_id, role, count in (("p0", "prefill", 1), ("p1", "prefill", 2), ("d0", "decode", 4)):
        loads.observe(role, replica_id, ZERO, 0.0)
        loads.observe(role, replica_id, ZERO + count, 1.0)
    assert {role: int(one.window_LE[0, 0]) for role, one in loads.pools().items()} == {"prefill": 3, "decode": 4}
    loads.forget("p0")
    loads.forget("p0")
    assert loads.pools()["prefill"].window_LE[0, 0] == 2


def test_a_replica_that_starts_anew_counts_from_nought() -> None:
    loads = ExpertLoads()
    loads.observe("prefill", "p0", ZERO, 0.0)
    loads.observe("prefill", "p0", ZERO + 9, 1.0)
    loads.observe("prefill", "p0", ZERO + 1, 2.0)
    loads.observe("prefill", "p0", ZERO + 3, 3.0)
    assert loads.pools()["prefill"].window_LE[0, 0] == 2
    loads.observe("prefill", "p0", np.zeros((3, 5), np.int64), 4.0)
    assert loads.pools()["prefill"].window_LE.shape == (3, 5)


def test_a_replicas_reports_carry_its_total_now_and_then() -> None:
    counted = ExpertTokens(2, 4)
    first = counted.report(10.0)
    counted.add(np.ones((2, 4), np.int32))
    assert first is not None and unpacked(first).sum() == 0
    assert counted.report(10.0 + REPORT_PERIOD_S / 2) is None
    later = counted.report(10.0 + REPORT_PERIOD_S)
    assert later is not None and later.int_bytes == 8 and unpacked(later).tolist() == [[1] * 4] * 2
