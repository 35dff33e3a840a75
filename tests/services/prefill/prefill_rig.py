"""One prefill service with a scripted decode replica and gateway: real sockets, real agents over loopback, the real model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from duomo.config import DuomoConfig
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.monolith import GenerateRequest, Monolith, MonolithLimits
from duomo.engine.runner import ModelRunner
from duomo.models.qwen3_moe import Model, load_model
from duomo.telemetry.tracing import Tracing, configure
from duomo.wire.values import Sampling
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import Fault, ScriptedFaults
from services.kv_transfer.membership import ReplicaCard
from services.kv_transfer.transport_loopback import LoopbackHub
from services.prefill.leg_book import LEASE_S
from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker, WorkerSizes
from tests.services.prefill.scripted_peers import GREEDY, ScriptedDecode, ScriptedGateway, kv_bytes, until

MODEL_DIR = Path(__file__).parents[3] / "models" / "tiny-moe"
BLOCK_TOKENS = 16
NUM_SEND_SLOTS = 4


@functools.cache
def model() -> Model:
    torch.set_num_threads(1)  # the expectations are computed beside the service
    return load_model(MODEL_DIR)


def ids(num_tokens: int, seed: int = 1) -> tuple[int, ...]:
    return tuple((seed * 7919 + place * 31 + place * place) % 8000 + 10 for place in range(num_tokens))


def expected_kv(token_ids: tuple[int, ...]) -> bytes:
    """The same KV computed in one step by the engine alone."""
    num_blocks = -(-len(token_ids) // BLOCK_TOKENS)
    cache = KvCache(kv_spec(model().config, BLOCK_TOKENS), num_blocks)
    table = list(range(num_blocks))
    ModelRunner(model(), cache).run(StepBatch(slices=(PromptSlice(token_ids=token_ids, start=0, block_table=table),)))
    return kv_bytes(cache, table, len(token_ids))


@functools.cache
def first_token(token_ids: tuple[int, ...], sampling: Sampling = GREEDY, choice: int = 0) -> int:
    return monolith_tokens(token_ids, msgspec.structs.replace(sampling, max_tokens=1), choice)[0]


def monolith_tokens(token_ids: tuple[int, ...], sampling: Sampling, choice: int) -> list[int]:
    num_blocks = -(-(len(token_ids) + sampling.max_tokens) // BLOCK_TOKENS)
    request = GenerateRequest(prompt_ids=token_ids, sampling=sampling, choice=choice)
    return [one.token_id for one in Monolith(model(), MonolithLimits(), num_blocks).generate([request])[0]]


@dataclass
class Rig:
    """One P, one D, one gateway."""

    service: PrefillService
    decode: ScriptedDecode
    gateway: ScriptedGateway
    hub: LoopbackHub
    config: DuomoConfig
    tracing: Tracing
    agent: TransferAgent
    worker: PrefillWorker

    async def is_clean(self) -> None:
        """Everything is back, and not by a lease's end: read from the report, as the router sees it, and from D's agent."""

        def check() -> bool:
            report, slots = self.service.report(), self.decode.agent.counts()
            return (
                report.num_free_blocks + report.num_cached_blocks == report.num_blocks
                and (report.num_queued, report.num_running, report.num_open_handles, report.num_open_spans) == (0, 0, 0, 0)
                and (slots.num_quarantined_slots, slots.num_free_slots, slots.num_open_handles) == (0, slots.num_slots, 0)
            )

        await until(check, "something is still held", LEASE_S / 2)


def config_for(run_dir: Path, **prefill: Any) -> DuomoConfig:
    transfer = prefill.pop("transfer", {})
    units = prefill.pop("units", 4)
    raw = {
        "model": {"path": str(MODEL_DIR), "units": units},
        "prefill": {"num_blocks": 256, "torch_threads": 1, "grant_timeout_s": 60.0, **prefill},
        "kv_transfer": {"transport": "loopback", "slot_bytes": 128 * 1024, "write_timeout_s": 60.0, **transfer},
        "tracing": {"directory": str(run_dir / "spans")},
        "run_dir": str(run_dir),
    }
    return DuomoConfig.model_validate(raw)


@contextlib.asynccontextmanager
async def rig(run_dir: Path, faults: dict[int, Fault] | None = None, **prefill: Any) -> AsyncIterator[Rig]:
    config = config_for(run_dir, **prefill)
    hub = LoopbackHub(ScriptedFaults(faults or {}))
    card = ReplicaCard.of(config, "prefill", "prefill-0", model().config.fingerprint)
    worker = PrefillWorker(model(), WorkerSizes.of(config))
    agent = TransferAgent(card.boot_id, hub.agent("p"), config.kv_transfer, num_send_slots=NUM_SEND_SLOTS)
    tracing = configure(config.tracing, "duomo-prefill", "prefill", "prefill-0")
    service = PrefillService(card, worker, agent, tracing)
    decode = ScriptedDecode(model().config, config, hub.agent("d"))
    await decode.start()
    await service.start()
    gateway = await ScriptedGateway.dial(service.membership.identity.address, model().config, config)
    try:
        yield Rig(service, decode, gateway, hub, config, tracing, agent, worker)
    finally:
        await gateway.close()
        await service.stop()
        await decode.close()
        agent.close()
        tracing.shutdown()


def run(test: Callable[[Path], Coroutine[Any, Any, None]], run_dir: Path) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(100):
            await test(run_dir)

    asyncio.run(bounded())
