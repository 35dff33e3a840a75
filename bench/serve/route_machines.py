"""PURE: modelled replicas for the simulator of routing: blocks and prefix caches are real, time is a formula. Knows no gateway.

A prefill replica computes waves one after the other; a decode replica steps its batch. Both report what real ones report.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from bench.serve.route_traces import SimRequest
from duomo.engine.blocks import BlockManager, PromptTable, allocate_prompt, prefix_hashes
from duomo.wire.messages import ReplicaReport
from services.router.policy import Need, decode_blocks
from services.router.waiting import PRIORITY_AGE_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What things take, in seconds. A wave: its tokens that no cache has times row_s, least_s at the least. A decode step: step_s and
    step_row_s for each sequence. handoff_s: from the first token until the sequence steps."""

    row_s: float = 1 / 2000
    least_s: float = 0.02
    step_s: float = 0.02
    step_row_s: float = 0.0005
    handoff_s: float = 0.005
    block_tokens: int = 16
    prefill_blocks: int = 512
    decode_blocks: int = 2048
    max_wave_tokens: int = 2048
    max_wave_prompts: int = 16
    max_batch: int = 64
    watermark_blocks: int = 8


@dataclass(slots=True, eq=False, kw_only=True)
class SimLeg:
    """One request on its pair. cached_tokens: found by prefill, decode_cached_tokens by decode."""

    request: SimRequest
    need: Need
    sent_s: float
    table: PromptTable | None = None
    cached_tokens: int = 0
    decode_table: PromptTable | None = None
    decode_cached_tokens: int = 0
    promise: int = 0
    num_emitted: int = 0
    is_granted: bool = False
    hashes: list[bytes] | None = None


@dataclass(slots=True)
class _Told:
    """What every report says that nothing here changes."""

    role: str
    replica_id: str

    def report(self, manager: BlockManager, **more: Any) -> ReplicaReport:
        zero = ("num_slots", "num_free_slots", "num_quarantined_slots", "num_open_handles", "num_open_spans", "num_steps")
        fields: dict[str, Any] = {
            "replica_id": self.replica_id,
            "boot_id": self.replica_id,
            "role": self.role,
            "is_draining": False,
            "num_blocks": manager.num_blocks,
            "num_free_blocks": manager.num_free,
            "num_cached_blocks": manager.num_cached,
            "block_tokens": manager.block_tokens,
            "prefix_digests": manager.digest.told(),
        }
        return ReplicaReport(**(dict.fromkeys(zero, 0) | fields | more))


class PrefillMachine:
    """Waves of granted prompts by rank, whole, one at a time."""

    def __init__(self, replica_id: str, machine: Machine) -> None:
        self.key = replica_id
        self.queue: list[SimLeg] = []
        self.wave: list[SimLeg] = []
        self.busy_s = 0.0
        self._machine = machine
        self._manager = BlockManager(machine.prefill_blocks, machine.block_tokens)
        self._began_s = self._ends_s = 0.0
        self._told = _Told("prefill", replica_id)

    def start_wave(self, now_s: float) -> float | None:
        """When the wave that begins now ends; None where none begins."""
        if self.wave:
            return None
        machine, num_tokens = self._machine, 0
        granted = sorted((leg for leg in self.queue if leg.is_granted), key=lambda leg: _rank(leg, now_s))
        for leg in granted:
            if len(self.wave) == machine.max_wave_prompts or (self.wave and num_tokens + leg.need.num_tokens > machine.max_wave_tokens):
                break
            table = allocate_prompt(self._manager, leg.request.prompt_ids, "")
            if table is None:
                break
            leg.table, leg.cached_tokens = table, table.cached_tokens
            num_tokens += leg.need.num_tokens - table.cached_tokens
            self.wave.append(leg)
            self.queue.remove(leg)
        if not self.wave:
            return None
        self._began_s, self._ends_s = now_s, now_s + max(num_tokens * machine.row_s, machine.least_s)
        self.busy_s += self._ends_s - now_s
        return self._ends_s

    def end_wave(self) -> list[SimLeg]:
        """Whose first tokens are there now."""
        ended, self.wave = self.wave, []
        for leg in ended:
            assert leg.table is not None
            self._manager.commit(leg.table.blocks, leg.table.hashes)
            self._manager.free(leg.table.blocks)
        return ended

    def report(self, now_s: float) -> ReplicaReport:
        manager, machine = self._manager, self._machine
        left = (self._ends_s - now_s) / machine.row_s if self.wave else 0.0
        known = sum(manager.num_known(_hashes(leg, machine.block_tokens)) * machine.block_tokens for leg in self.queue)
        waiting = sum(leg.need.num_tokens for leg in self.queue)
        return self._told.report(
            manager,
            num_running=len(self.wave),
            num_queued=len(self.queue),
            num_queued_tokens=waiting,
            num_work_tokens=round(max(left, 0.0)) + waiting - known,
            tokens_per_s=1 / machine.row_s,
            step_s=machine.least_s,
        )


@dataclass(slots=True)
class DecodeMachine:
    """Grants in order, and steps everybody who has arrived."""

    key: str
    machine: Machine
    waiting: deque[SimLeg] = field(default_factory=deque)
    landing: int = 0
    running: list[SimLeg] = field(default_factory=list)
    is_stepping: bool = False
    promised: int = 0
    manager: BlockManager = field(init=False)

    def __post_init__(self) -> None:
        self.manager = BlockManager(self.machine.decode_blocks, self.machine.block_tokens)

    def grant(self) -> list[SimLeg]:
        """Those at the head that fit now."""
        granted = []
        machine = self.machine
        while self.waiting:
            leg = self.waiting[0]
            promise = decode_blocks(leg.need, machine.block_tokens)
            num_live = self.landing + len(self.running)
            is_alone = num_live == 0
            reserve = 0 if is_alone else machine.watermark_blocks
            has_place = is_alone or num_live < machine.max_batch
            if not has_place or promise + reserve > self.manager.num_available - self.promised:
                break
            table = allocate_prompt(self.manager, leg.request.prompt_ids, "")
            assert table is not None
            leg.decode_table, leg.decode_cached_tokens, leg.is_granted = table, table.cached_tokens, True
            leg.promise = promise - len(table.blocks)
            self.promised += leg.promise
            self.landing += 1
            granted.append(self.waiting.popleft())
        return granted

    def join(self, leg: SimLeg) -> None:
        """Its KV is here."""
        assert leg.decode_table is not None
        self.manager.commit(leg.decode_table.blocks, leg.decode_table.hashes)
        self.landing -= 1
        self.running.append(leg)

    def step_takes_s(self) -> float:
        return self.machine.step_s + self.machine.step_row_s * len(self.running)

    def step(self) -> list[SimLeg]:
        """One token for everybody; whose last it was."""
        for leg in self.running:
            leg.num_emitted += 1
        ended = [leg for leg in self.running if leg.num_emitted >= leg.request.output_tokens]
        for leg in ended:
            assert leg.decode_table is not None
            self.running.remove(leg)
            self.promised -= leg.promise
            self.manager.free(leg.decode_table.blocks)
        return ended

    def report(self, now_s: float) -> ReplicaReport:
        blocks_waited_for = sum(decode_blocks(leg.need, self.machine.block_tokens) for leg in self.waiting)
        return _Told("decode", self.key).report(
            self.manager,
            num_running=len(self.running),
            num_queued=len(self.waiting) + self.landing,
            num_queued_tokens=sum(leg.need.num_tokens for leg in self.waiting),
            num_promised_blocks=self.promised + blocks_waited_for,
            step_s=self.step_takes_s() if self.running else 0.0,
        )


def _rank(leg: SimLeg, now_s: float) -> tuple[int, float]:
    """As prefill's policy: priority, which grows with age, then arrival."""
    return (-(leg.request.priority + int((now_s - leg.sent_s) / PRIORITY_AGE_S)), leg.sent_s)


def _hashes(leg: SimLeg, block_tokens: int) -> list[bytes]:
    if leg.hashes is None:
        usable = (len(leg.request.prompt_ids) - 1) // block_tokens * block_tokens
        leg.hashes = prefix_hashes(leg.request.prompt_ids[:usable], block_tokens, "")
    return leg.hashes
