"""Owns one decode process from its model folder to its end: model, worker, agent, directory, tracing and service. Knows no request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from duomo.config import DuomoConfig
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.errors import ConfigError
from duomo.models.qwen3_moe import load_model
from duomo.telemetry import tracing
from duomo.telemetry.tracing import Tracing
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker, StepWorker
from services.engine_start import engine_in, page_locks, ring_memory, ring_memory_name
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.directory import Directory
from services.kv_transfer.ending import SERVICE_LIMIT_S, STEP_THREAD_LIMIT_S, closed, in_thread
from services.kv_transfer.membership import ReplicaCard
from services.kv_transfer.step_thread import StepThread
from services.kv_transfer.transport_nixl import NixlTransport

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaParts:
    """What a DecodeService is given."""

    card: ReplicaCard
    worker: StepWorker
    agent: TransferAgent
    tracing: Tracing
    directory: Directory
    thread: StepThread


@asynccontextmanager
async def opened(config: DuomoConfig, replica_id: str) -> AsyncIterator[ReplicaParts]:
    """Load and open everything, close it in reverse. Raises ConfigError and ModelError naming what is wrong."""
    if not config.redis.url:
        raise ConfigError("redis.url (DUOMO_REDIS_URL) is empty: a replica that runs by itself must be told where its directory is")
    if config.kv_transfer.transport != "nixl":
        raise ConfigError("kv_transfer.transport is 'loopback', which works within one process only; a replica needs 'nixl'")
    async with AsyncExitStack() as ends:
        spans = tracing.configure(config.tracing, "duomo-decode", "decode", replica_id)
        ends.push_async_callback(closed, "the spans", in_thread(spans.shutdown))
        directory = Directory(config.redis.url, config.redis.lease_s)
        ends.push_async_callback(closed, "the directory", directory.close)
        thread = StepThread("decode-step")
        ends.push_async_callback(closed, "the step thread", in_thread(thread.close), STEP_THREAD_LIMIT_S)
        worker, config = await _started(config, thread, spans, ends)
        card = ReplicaCard.of(config, "decode", replica_id, worker.config.fingerprint)
        transport = await asyncio.to_thread(NixlTransport, f"{replica_id}.{card.boot_id}", config.kv_transfer, page_locks(config))
        agent = TransferAgent(card.boot_id, transport, config.kv_transfer, num_send_slots=1, allocate=ring_memory(config))
        ends.push_async_callback(closed, "the transfer agent", in_thread(agent.close))
        proof, where = await asyncio.to_thread(agent.prove), ring_memory_name(config)
        log.info("%s moved and verified one message in %s in %.3f s", proof.way, where, proof.seconds)
        blocks, tokens = config.decode.num_blocks, config.model.block_tokens
        log.info("decode: %d blocks of %d tokens, transport %s", blocks, tokens, proof.way)
        yield ReplicaParts(card=card, worker=worker, agent=agent, tracing=spans, directory=directory, thread=thread)


async def _started(config: DuomoConfig, thread: StepThread, spans: Tracing, ends: AsyncExitStack) -> tuple[StepWorker, DuomoConfig]:
    """The device's worker, and the configuration with what was planned for it. ends: what closes it. Raises ConfigError and ModelError."""
    if config.model.device != "cuda":
        model = await asyncio.to_thread(load_model, config.model.path, progress=False)
        section = config.decode
        cache = KvCache(kv_spec(model.config, config.model.block_tokens), section.num_blocks)
        kv_dtype, delay_s = config.kv_transfer.kv_dtype, config.delays.decode_step_s
        return DecodeWorker(model, cache, torch_threads=section.torch_threads, step_delay_s=delay_s, kv_dtype=kv_dtype), config
    engine = await engine_in(thread, spans, config, "decode")
    ends.callback(engine.compilations.close)
    from duomo.engine.gpu_start import planned
    from services.decode.gpu_worker import GpuDecodeWorker

    return GpuDecodeWorker(engine, config.delays.decode_step_s, config.kv_transfer.kv_dtype), planned(config, engine.plan, "decode")


async def run_replica(config: DuomoConfig, replica_id: str, stop: asyncio.Event) -> None:
    """Build one replica, serve until `stop` (or an operator's Drain, or something breaks), drain, unregister. Raises what broke it."""
    async with opened(config, replica_id) as parts:
        service = DecodeService(parts.card, parts.worker, parts.agent, parts.tracing, parts.directory, parts.thread)
        try:
            await service.start()
            await service.membership.serve(stop)
        finally:
            await closed("the service", service.stop, SERVICE_LIMIT_S)
