"""One decode replica with a scripted producer and gateway around it, in one process, and what must hold when it rests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from duomo.config import DuomoConfig
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.telemetry.tracing import Tracing, configure
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import FaultPlan
from services.kv_transfer.membership import ReplicaCard
from services.kv_transfer.transport_loopback import LoopbackHub
from tests.services.decode.scripted_gateway import ScriptedGateway
from tests.services.decode.scripted_peers import (
    BLOCK_TOKENS,
    MODEL_DIR,
    WAIT_S,
    Prompt,
    ScriptedPrefill,
    model,
    until,
)


@dataclass
class Rig:
    """One D, one P, one gateway, one hub."""

    service: DecodeService
    worker: DecodeWorker
    agent: TransferAgent
    prefill: ScriptedPrefill
    gateway: ScriptedGateway
    hub: LoopbackHub
    config: DuomoConfig
    tracing: Tracing

    async def at_rest(self, *, quarantined: int = 0) -> None:
        """Every block and slot is back, seen from the report."""

        def rests() -> bool:
            report = self.service.report()
            slots = report.num_free_slots + report.num_quarantined_slots
            return (
                report.num_free_blocks + report.num_cached_blocks == report.num_blocks
                and report.num_quarantined_slots == quarantined
                and (slots == report.num_slots or quarantined > 0)
                and report.num_queued == report.num_running == report.num_open_spans == 0
            )

        try:
            await until(rests, 10.0)
        except TimeoutError as error:
            raise AssertionError(f"not at rest: {self.service.report()}") from error
        self.service.pool.check_integrity()
        self.service.check_health()


def configuration(tmp_path: Path, changes: dict[str, dict[str, object]] | None = None) -> DuomoConfig:
    raw: dict[str, dict[str, object]] = {
        "model": {"path": str(MODEL_DIR)},
        "decode": {"num_blocks": 96, "watermark_blocks": 2, "torch_threads": 1},
        "prefill": {"torch_threads": 1},
        "kv_transfer": {"transport": "loopback", "slot_bytes": 64 * 1024, "write_timeout_s": 30.0},
    }
    for section, options in (changes or {}).items():
        raw.setdefault(section, {}).update(options)
    return DuomoConfig.model_validate(raw | {"run_dir": str(tmp_path)})


@asynccontextmanager
async def running(config: DuomoConfig, faults: FaultPlan | None = None) -> AsyncIterator[Rig]:
    """A served, connected rig; closed in reverse."""
    hub = LoopbackHub(faults)
    card = ReplicaCard.of(config, "decode", "decode-0", model().config.fingerprint)
    agent = TransferAgent(card.boot_id, hub.agent(card.boot_id), config.kv_transfer, num_send_slots=1)
    tracing = configure(config.tracing, "duomo-decode", "decode", "decode-0")
    cache = KvCache(kv_spec(model().config, BLOCK_TOKENS), config.decode.num_blocks)
    worker = DecodeWorker(model(), cache, torch_threads=config.decode.torch_threads, kv_dtype=config.kv_transfer.kv_dtype)
    service = DecodeService(card, worker, agent, tracing)
    prefill, gateway = ScriptedPrefill(config, hub), ScriptedGateway(config)
    try:
        await service.start()
        address = service.membership.identity.address
        await prefill.connect(address)
        await gateway.connect(address)
        async with asyncio.timeout(WAIT_S):
            await prefill.ring.wait()
        yield Rig(service, worker, agent, prefill, gateway, hub, config, tracing)
    finally:
        await gateway.close()
        await prefill.close()
        await service.stop()
        agent.close()
        tracing.shutdown()


async def serve(rig: Rig, prompt: Prompt) -> list[int]:
    """The whole request; all tokens of its first choice, P's first one included."""
    rig.gateway.start(prompt, rig.prefill)
    computed = await rig.prefill.prefill(prompt)
    await rig.gateway.finished(prompt.request_id)
    return [computed.first_token_ids[0], *rig.gateway.answers[prompt.request_id].ids(prompt.choices[0])]
