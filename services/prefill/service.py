"""Owns one prefill replica: its parts' start and end, which message goes where, its report. Knows no leg's state and no torch.

Everything here runs on the event loop. Threads: the step thread and one that waits for a device's pieces (waves.py), the agent's writer
thread (ring_handoffs.py), and one that attaches rings (decode_peers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import Counter

from duomo.config import DuomoConfig
from duomo.errors import ConfigError, DuomoError, EngineError, PeerError, WireError
from duomo.models.config import served_config
from duomo.models.qwen3_moe import load_model
from duomo.telemetry.tracing import Tracing
from duomo.telemetry.tracing import configure as configure_tracing
from duomo.wire.connection import Connection
from duomo.wire.messages import (
    Cancel,
    GroupLanded,
    HandleOffered,
    Message,
    PullKv,
    Refused,
    ReplicaReport,
    RequestFailed,
    RingOffered,
    StartPrefill,
)
from duomo.wire.values import PeerAddress
from services.engine_start import engine_in, page_locks, ring_memory, ring_memory_name
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.directory import Directory
from services.kv_transfer.ending import PREFILL_LIMIT_S, STEP_THREAD_LIMIT_S, closed, end_tasks, in_thread
from services.kv_transfer.loans import BlockLoans
from services.kv_transfer.membership import Membership, Progress, ReplicaCard
from services.kv_transfer.step_thread import StepThread
from services.kv_transfer.transport_nixl import NixlTransport
from services.prefill.leg_book import LegBook
from services.prefill.worker import PrefillWorker, WaveWorker, WorkerSizes, group_bounds

CONNECT_AHEAD_PERIOD_S = 0.5

log = logging.getLogger(__name__)


class PrefillService:
    """One replica: a ReplicaLogic. start() once, stop() once; what it was given is its creator's to close afterwards.

    means: how KV gets to decode (LegBook). thread: where groups are computed; None: one of its own.
    """

    def __init__(
        self,
        card: ReplicaCard,
        worker: WaveWorker,
        means: TransferAgent | BlockLoans,
        tracing: Tracing,
        directory: Directory | None = None,
        thread: StepThread | None = None,
    ) -> None:
        self.card = card
        self.progress = Progress(card.config.prefill.hang_timeout_s)
        self.membership = Membership(card, self, directory)
        self._worker = worker
        self._means = means
        self._tracing = tracing
        self._thread = thread or StepThread("prefill-step")
        self._owns_thread = thread is None
        self._book = LegBook(card, worker, means, tracing, self.progress, self.membership.connect, self._thread)
        self._loop_task: asyncio.Task[None] | None = None

    # life

    async def start(self) -> None:
        """Warm, then listen and register: a registered replica is ready."""
        await self._book.waves.warm()
        await self._book.grammars.warm()
        self._loop_task = asyncio.get_running_loop().create_task(self._book.waves.run())
        await self.membership.start()

    async def drain(self, deadline_s: float) -> bool:
        """Take no new request and finish the live ones; whether all finished in time."""
        return await self.membership.drain(deadline_s)

    async def stop(self) -> None:
        """Close every socket; legs still alive are dropped with them."""
        await self.membership.stop()
        if self._loop_task is not None:
            await end_tasks((self._loop_task,))
        if self._owns_thread:
            await asyncio.to_thread(self._thread.close)
        await asyncio.to_thread(self._book.waves.close)
        await self._book.peers.close()

    def check_health(self) -> None:
        """Raises EngineError when pending work does not move, what failure() says where something has ended."""
        self.progress.check()
        failure = self.failure()
        if failure is not None:
            raise failure

    def prepare(self, decode: PeerAddress) -> None:
        """Connect to a decode replica before the first request names it."""
        self._book.peers.want(decode)

    # ReplicaLogic

    def joined(self, peer: Connection) -> None:
        """Nothing to do: a gateway speaks first, a decode replica offers its ring."""

    def received(self, peer: Connection, message: Message) -> None:
        """Raises WireError for what nobody sends to a prefill replica."""
        match message:
            case StartPrefill():
                self._book.start(peer, message)
            case Cancel():
                self._book.cancel(message)
            case RingOffered():
                self._book.peers.ring_offered(peer, message)
            case HandleOffered():
                self._book.peers.when_attached(peer, lambda: self._book.granted(message))
            case GroupLanded():
                self._book.handoffs.landed(message)
            case PullKv():
                self._book.pull(message)
            case RequestFailed():
                self._book.failed_by_decode(message)
            case Refused():
                level = logging.INFO if message.code == "stale" else logging.WARNING  # stale: it crossed the end of its leg, as cancels do
                log.log(level, "%s %s refused a message: %s (%s)", peer.peer.role, peer.peer.replica_id, message.code, message.detail)
            case _:
                raise WireError(f"a prefill replica takes no {type(message).__name__}", code="unexpected_message")

    def left(self, peer: Connection) -> None:
        """A peer's socket ended: a gateway's requests are cancelled, a decode replica's fail."""
        if peer.peer.role == "decode":
            self._book.peers.left(peer)
        self._book.cancel_all_of(peer)

    def begin_drain(self) -> None:
        self._book.is_draining = True

    def end_drain(self) -> None:
        self._book.is_draining = False

    def flush_caches(self) -> int:
        num_blocks = self._book.blocks.manager.flush()
        self._book.counters["prefix_blocks_flushed"] += num_blocks
        return num_blocks

    def num_live_requests(self) -> int:
        return self._book.num_live

    def failure(self) -> DuomoError | None:
        """The planning task has ended, or nothing is pushed any more."""
        if self._loop_task is not None and self._loop_task.done():
            error = None if self._loop_task.cancelled() else self._loop_task.exception()
            return error if isinstance(error, DuomoError) else EngineError(f"the wave loop has ended: {error!r}")
        return self._means.failure

    def report(self) -> ReplicaReport:
        """What the router's policy and the invariants read."""
        slots = self._means.counts()
        waiting = self._book.waves.waiting.values()
        blocks = self._book.blocks.manager
        return ReplicaReport(
            replica_id=self.card.replica_id,
            boot_id=self.card.boot_id,
            role="prefill",
            is_draining=self._book.is_draining,
            num_running=self._book.num_live - len(waiting),
            num_queued=len(waiting),
            num_queued_tokens=sum(len(leg.token_ids) for leg in waiting),
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free,
            num_cached_blocks=blocks.num_cached,
            num_slots=slots.num_slots,
            num_free_slots=slots.num_free_slots,
            num_quarantined_slots=slots.num_quarantined_slots,
            num_open_handles=self._book.handoffs.num_open,
            num_open_spans=self._tracing.num_open_spans(),
            num_steps=self._book.waves.num_groups_run,
            block_tokens=blocks.block_tokens,
            prefix_digests=blocks.digest.told(),
            counters={
                **(self._book.counters + Counter(slots.counters)),
                "prefix_blocks_evicted": blocks.num_evicted,
                "expert_bytes_read": self._book.waves.expert_bytes_read,
                **self._worker.counters(),
            },
            progress_age_s=self.progress.age_s(),
            pid=os.getpid(),
            transport=self._means.transport_name,
            experts=self._book.experts.report(time.monotonic()),
            num_work_tokens=self._book.num_work_tokens(),
            tokens_per_s=self._book.waves.tokens_per_s,
            step_s=self._book.waves.least_s,
        )


async def run_replica(config: DuomoConfig, replica_id: str, stop: asyncio.Event) -> None:
    """One prefill replica from its model folder to its end: load, warm, register, serve until `stop`, drain, unregister."""
    if not config.redis.url:
        raise ConfigError("redis.url (DUOMO_REDIS_URL) is empty: a replica that runs by itself must be told where its directory is")
    if config.kv_transfer.transport != "nixl":
        raise ConfigError("kv_transfer.transport is 'loopback', which works within one process only; a replica needs 'nixl'")
    async with contextlib.AsyncExitStack() as ends:
        tracing = configure_tracing(config.tracing, "duomo-prefill", "prefill", replica_id)
        ends.push_async_callback(closed, "the spans", in_thread(tracing.shutdown))
        directory = Directory(config.redis.url, config.redis.lease_s)
        ends.push_async_callback(closed, "the directory", directory.close)
        thread = StepThread("prefill-step")
        ends.push_async_callback(closed, "the step thread", in_thread(thread.close), STEP_THREAD_LIMIT_S)
        worker, config = await _started(config, thread, tracing, ends)
        card = ReplicaCard.of(config, "prefill", replica_id, worker.config.fingerprint)
        transport = await asyncio.to_thread(NixlTransport, f"{replica_id}.{card.boot_id}", config.kv_transfer, page_locks(config))
        memory, num_slots = ring_memory(config), config.prefill.send_slots
        agent = TransferAgent(card.boot_id, transport, config.kv_transfer, num_send_slots=num_slots, allocate=memory)
        ends.push_async_callback(closed, "the transfer agent", in_thread(agent.close))
        service = PrefillService(card, worker, agent, tracing, directory, thread)
        ends.push_async_callback(closed, "the service", service.stop, PREFILL_LIMIT_S)
        proof, where = await asyncio.to_thread(agent.prove), ring_memory_name(config)
        log.info("%s moved and verified one message in %s in %.3f s", proof.way, where, proof.seconds)
        await service.start()
        log.info("prefill replica %s serves at %s over %s", replica_id, service.membership.identity.address, proof.way)
        ahead = asyncio.create_task(_connect_ahead(service, directory))
        try:
            await service.membership.serve(stop)
        finally:
            await end_tasks((ahead,))


async def _started(
    config: DuomoConfig, thread: StepThread, tracing: Tracing, ends: contextlib.AsyncExitStack
) -> tuple[WaveWorker, DuomoConfig]:
    """The device's worker, and the configuration with what was planned for it. ends: what closes it. Raises ConfigError and ModelError."""
    if config.model.device != "cuda":
        model = await asyncio.to_thread(load_model, config.model.path)
        return PrefillWorker(model, WorkerSizes.of(config), config.delays), config
    # refuses before minutes of loading
    group_bounds(served_config(config.model).num_layers, config.model.units, config.prefill.units_per_group)
    engine = await engine_in(thread, tracing, config, "prefill")
    ends.callback(engine.compilations.close)
    from duomo.engine.gpu_start import planned
    from services.prefill.gpu_worker import GpuPrefillWorker

    config = planned(config, engine.plan, "prefill")
    return GpuPrefillWorker(engine, WorkerSizes.of(config), config.delays), config


async def _connect_ahead(service: PrefillService, directory: Directory) -> None:
    """Keep a socket and a ring to every decode replica of this model, so that no request pays for them. Ends by being cancelled."""
    while True:
        with contextlib.suppress(PeerError):  # an absent directory stops nothing: StartPrefill names its decode replica itself
            for member in await directory.members():
                if member.role == "decode" and member.model_fingerprint == service.card.model_fingerprint:
                    service.prepare(PeerAddress(replica_id=member.replica_id, boot_id=member.boot_id, address=member.address))
        await asyncio.sleep(CONNECT_AHEAD_PERIOD_S)
