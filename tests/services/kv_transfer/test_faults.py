"""Faults are the same for the same seed, and scripted ones hit the named write alone."""

from __future__ import annotations

from services.kv_transfer.faults import NO_FAULT, Fault, ScriptedFaults, SeededFaults


def test_seeded_faults_repeat() -> None:
    plan = SeededFaults(seed=3, max_delay_s=0.1, chance_drop=0.3, chance_corrupt=0.3, chance_duplicate=0.3)
    drawn = [plan.fault(i, 257) for i in range(200)]
    assert drawn == [plan.fault(i, 257) for i in range(200)]
    assert drawn != [SeededFaults(seed=4, max_delay_s=0.1, chance_drop=0.3, chance_corrupt=0.3).fault(i, 257) for i in range(200)]
    assert 30 < sum(fault.drops_data for fault in drawn) < 90
    assert all(fault.corrupt_byte is None or 0 <= fault.corrupt_byte < 257 for fault in drawn)


def test_throttle_adds_the_time_of_the_bytes() -> None:
    assert SeededFaults(seed=0, max_bytes_per_s=1000.0).fault(0, 500).delay_s == 0.5


def test_scripted_faults_hit_the_named_write() -> None:
    plan = ScriptedFaults({2: Fault(drops_data=True)})
    assert plan.fault(1, 1) is NO_FAULT and plan.fault(2, 1).drops_data
