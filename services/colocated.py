"""Owns one process that is both a prefill and a decode replica: one model, one KV cache, one block pool, one step thread. Knows no request.

docs/decisions/0007-one-process.md. Both services run on one event loop, each with its own socket, lease and reports. They live and die
together. On a GPU the engine of 0006-gpu-engine.md computes for both, and its memory plan says how many blocks there are:

    await run_replica(config, "engine-0", stop)     # registers "engine-0.prefill" and "engine-0.decode"
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass

from duomo.config import DuomoConfig
from duomo.engine.blocks import BlockManager
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.errors import ConfigError
from duomo.models.config import served_config
from duomo.models.qwen3_moe import Model, load_model
from duomo.telemetry import tracing
from duomo.telemetry.tracing import Tracing
from duomo.wire.values import PeerAddress
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker, StepWorker
from services.engine_start import engine_in
from services.kv_transfer.directory import Directory
from services.kv_transfer.ending import PREFILL_LIMIT_S, SERVICE_LIMIT_S, STEP_THREAD_LIMIT_S, closed, in_thread
from services.kv_transfer.loans import BlockLoans
from services.kv_transfer.membership import FAILED_DRAIN_S, ReplicaCard
from services.kv_transfer.step_thread import StepThread
from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker, WaveWorker, WorkerSizes, group_bounds

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """What computes waves and steps, over one cache of config.decode.num_blocks. Whoever starts them calls close() at the end."""

    prefill: WaveWorker
    decode: StepWorker
    config: DuomoConfig
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineMeans:
    """What both services share besides model and pool; the creator closes it."""

    thread: StepThread
    prefill_spans: Tracing
    decode_spans: Tracing
    directory: Directory | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Both services of one process, and the blocks that they share. start() once, stop() once."""

    prefill: PrefillService
    decode: DecodeService
    loans: BlockLoans

    async def start(self) -> None:
        """Decode first: nothing reaches prefill before its decode is there."""
        await self.decode.start()
        await self.prefill.start()
        identity = self.decode.membership.identity
        self.prefill.prepare(PeerAddress(replica_id=identity.replica_id, boot_id=identity.boot_id, address=identity.address))

    async def serve(self, stop: asyncio.Event) -> None:
        """Until `stop`, or an operator's Drain of either: then both drain. Where one breaks both end. Raises what broke."""
        over = asyncio.Event()
        members = (self.prefill.membership, self.decode.membership)
        serving = [asyncio.create_task(member.serve(over)) for member in members]
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((*serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            over.set()
            await asyncio.wait(serving, return_when=asyncio.FIRST_EXCEPTION)
            if not all(task.done() for task in serving):  # one has broken: what the other can still finish, it may
                await asyncio.gather(*(member.drain(FAILED_DRAIN_S) for member in members))
        finally:
            for task in (*serving, stopping):
                task.cancel()
            ends = await asyncio.gather(*serving, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):  # not a CancelledError: ours
                raise end

    async def stop(self) -> None:
        try:
            await self.prefill.stop()
        finally:
            await self.decode.stop()


def workers_of(model: Model, config: DuomoConfig) -> Workers:
    """Both workers over one cache of decode.num_blocks."""
    cache = KvCache(kv_spec(model.config, config.model.block_tokens), config.decode.num_blocks)
    return Workers(
        prefill=PrefillWorker(model, WorkerSizes.of(config), config.delays, cache),
        decode=DecodeWorker(model, cache, torch_threads=config.decode.torch_threads, step_delay_s=config.delays.decode_step_s),
        config=config,
    )


async def started_workers(config: DuomoConfig, means: EngineMeans) -> Workers:
    """The device's. Raises ConfigError and ModelError naming what is wrong."""
    if config.model.device != "cuda":
        return workers_of(await asyncio.to_thread(load_model, config.model.path, progress=False), config)
    # refuses before minutes of loading
    group_bounds(served_config(config.model).num_layers, config.model.units, config.prefill.units_per_group)
    engine = await engine_in(means.thread, means.decode_spans, config, "both")
    from services.gpu_workers import gpu_workers  # Triton and all kernels: a CPU serves without

    made = gpu_workers(engine, config)
    return Workers(prefill=made.prefill, decode=made.decode, config=made.config, close=engine.compilations.close)


def loans_of(config: DuomoConfig, lender_boot_id: str) -> BlockLoans:
    """The one block pool, with the one prefix cache over it."""
    pool = BlockManager(config.decode.num_blocks, config.model.block_tokens, max_cached_blocks=config.decode.prefix_cache_blocks)
    return BlockLoans(lender_boot_id, pool)


def engine_of(workers: Workers, replica_id: str, means: EngineMeans) -> Engine:
    """Both services over one cache, pool and thread."""
    config, fingerprint = workers.config, workers.decode.config.fingerprint
    prefill_card = ReplicaCard.of(config, "prefill", f"{replica_id}.prefill", fingerprint)
    decode_card = ReplicaCard.of(config, "decode", f"{replica_id}.decode", fingerprint)
    loans = loans_of(config, decode_card.boot_id)
    return Engine(
        prefill=PrefillService(prefill_card, workers.prefill, loans, means.prefill_spans, means.directory, means.thread),
        decode=DecodeService(decode_card, workers.decode, loans, means.decode_spans, means.directory, means.thread),
        loans=loans,
    )


@asynccontextmanager
async def opened(config: DuomoConfig, replica_id: str) -> AsyncIterator[Engine]:
    """Load and open everything, close it in reverse. Raises ModelError naming what is wrong."""
    async with AsyncExitStack() as ends:
        directory = Directory(config.redis.url, config.redis.lease_s)
        means = EngineMeans(
            thread=StepThread("engine-step"),
            prefill_spans=tracing.configure(config.tracing, "duomo-prefill", "prefill", f"{replica_id}.prefill"),
            decode_spans=tracing.configure(config.tracing, "duomo-decode", "decode", f"{replica_id}.decode"),
            directory=directory,
        )
        for spans in (means.decode_spans, means.prefill_spans):
            ends.push_async_callback(closed, "the spans", in_thread(spans.shutdown))
        ends.push_async_callback(closed, "the directory", directory.close)
        compiling = ends.enter_context(ExitStack())  # of the workers, closed once nothing computes any more
        ends.push_async_callback(closed, "the step thread", in_thread(means.thread.close), STEP_THREAD_LIMIT_S)
        workers = await started_workers(config, means)
        compiling.callback(workers.close)
        planned = workers.config
        log.info("one process for prefill and decode: %d blocks of %d tokens", planned.decode.num_blocks, planned.model.block_tokens)
        yield engine_of(workers, replica_id, means)


async def run_replica(config: DuomoConfig, replica_id: str, stop: asyncio.Event) -> None:
    """The process from its model folder to its end: load, warm, register both, serve until `stop`, drain, unregister."""
    if config.layout != "colocated":
        raise ConfigError("layout is 'split': an engine serves layout 'colocated'; start prefill and decode replicas instead")
    if not config.redis.url:
        raise ConfigError("redis.url (DUOMO_REDIS_URL) is empty: a replica that runs by itself must be told where its directory is")
    async with opened(config, replica_id) as engine:
        try:
            await engine.start()
            await engine.serve(stop)
        finally:
            await closed("both services", engine.stop, PREFILL_LIMIT_S + SERVICE_LIMIT_S)
