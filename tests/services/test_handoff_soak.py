"""Handoffs by the hundred here and by ten thousand in the long lane: under faults and random cancels nothing is lost, kept or mistaken."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from duomo.config import DuomoConfig
from services.kv_transfer.faults import SeededFaults
from tests.services.decode.rig import configuration
from tests.services.handoff_soak import Drawn, Soak, soaked


def _configuration(folder: Path, transport: str) -> DuomoConfig:
    """Pools and rings in which requests wait for each other, timeouts short enough for what is lost to be missed often."""
    return configuration(
        folder,
        {
            "decode": {"num_blocks": 72, "watermark_blocks": 2, "ring_slots": 6, "prefix_cache_blocks": 24, "admit_ahead_tokens": 4},
            "prefill": {"num_blocks": 64, "send_slots": 4, "prefix_cache_blocks": 16, "grant_timeout_s": 60.0},
            "kv_transfer": {"transport": transport, "write_timeout_s": 0.6, "ucx_net_devices": "lo"},
        },
    )


def _run(folder: Path, transport: str, drawn: Drawn) -> Soak:
    above = SeededFaults(seed=drawn.seed, max_delay_s=0.003, chance_drop=0.004, chance_drop_notification=0.02, chance_corrupt=0.01)
    hub = SeededFaults(seed=drawn.seed + 1, max_delay_s=0.002, chance_duplicate=0.02, chance_announce_early=0.05)

    async def go() -> Soak:
        async with soaked(_configuration(folder, transport), folder / "small", drawn, above, hub) as soak:
            await soak.run()
            print(json.dumps(soak.ledger(), indent=1))  # shown where the test fails, or with -s
            soak.judge()
        return soak

    return asyncio.run(go())


@pytest.mark.timeout(400)  # longer than the soak's own limits, which name what did not end
def test_hundreds_of_handoffs_under_faults_and_cancels_leave_nothing_behind(tmp_path: Path) -> None:
    soak = _run(tmp_path, "loopback", Drawn(num_handoffs=250, seed=5, chance_break=0.02, chance_stop=0.02))
    assert soak.outcomes["cancelled"] and soak.outcomes["ok"] > 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("transport", ["loopback", "nixl"])
def test_ten_thousand_handoffs_under_faults_and_cancels_leave_nothing_behind(tmp_path: Path, transport: str) -> None:
    soak = _run(tmp_path, transport, Drawn(num_handoffs=10_000, seed=20261122, longest_stop_s=3.0 if transport == "loopback" else 0.0))
    assert soak.events["sockets broken"] and soak.outcomes["cancelled"] > 1000 and soak.outcomes["ok"] > 5000
