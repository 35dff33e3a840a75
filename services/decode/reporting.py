"""Owns what a decode replica tells of itself, ten times a second. Knows no peer: membership.py sends it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from duomo.telemetry.expert_tokens import ExpertTokens
from duomo.telemetry.tracing import Tracing
from duomo.wire.messages import ReplicaReport
from services.decode.arrivals import Arrivals
from services.decode.batch import Batch
from services.decode.leg import Leg, LegState
from services.decode.pace import StepPace
from services.decode.pool import Pool
from services.decode.worker import StepWorker
from services.kv_transfer.membership import Progress, ReplicaCard


@dataclass(frozen=True, kw_only=True, slots=True)
class Reporter:
    """What a report is read from; the parts are the service's."""

    card: ReplicaCard
    tracing: Tracing
    worker: StepWorker
    pool: Pool
    batch: Batch
    arrivals: Arrivals
    progress: Progress
    pace: StepPace
    counters: Counter[str]
    experts: ExpertTokens

    def report(self, legs: Collection[Leg], *, is_draining: bool) -> ReplicaReport:
        """legs: all that are alive here."""
        slots, pool = self.arrivals.counts(), self.pool
        queued = [leg for leg in legs if leg.state is not LegState.RUNNING]
        unpromised = [leg for leg in queued if leg.state is not LegState.GRANTED]
        return ReplicaReport(
            replica_id=self.card.replica_id,
            boot_id=self.card.boot_id,
            role="decode",
            is_draining=is_draining,
            num_running=len(self.batch),
            num_queued=len(queued),
            num_queued_tokens=sum(leg.num_tokens for leg in queued),
            num_blocks=pool.limits.num_blocks,
            num_free_blocks=pool.manager.num_free,
            num_cached_blocks=pool.manager.num_cached,
            num_slots=slots.num_slots,
            num_free_slots=slots.num_free_slots,
            num_quarantined_slots=slots.num_quarantined_slots,
            num_open_handles=slots.num_open_handles,
            num_open_spans=self.tracing.num_open_spans(),
            num_steps=self.progress.num_steps,
            block_tokens=pool.limits.block_tokens,
            prefix_digests=pool.manager.digest.told(),
            counters={**(self.counters + Counter(slots.counters)), **pool.counters, **self.worker.counters()},
            progress_age_s=self.progress.age_s(),
            pid=os.getpid(),
            transport=self.arrivals.way,
            experts=self.experts.report(time.monotonic()),
            num_promised_blocks=pool.open_promise_blocks() + sum(leg.num_promised(pool.limits) for leg in unpromised),
            step_s=self.pace.step_s,
            max_choices=self.pace.max_choices,
        )
