"""Owns the replay of arrivals against the policy: a virtual clock, and a machine that is a formula. PURE: knows no service and no tensor.

    replayed = replay(trace, limits, Machine(row_s=1e-6, least_s=2e-4))
    replayed.ttft_s("a-1"), replayed.runs, replayed.most_passes

What the policy is told and what follows its plans is what services/prefill/waves.py does; a trace is drawn, or recorded (trace_of_json).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import msgspec

from services.prefill.pieces import Piece, advanced, next_piece, num_rows
from services.prefill.policy import NewWave, NextPiece, Plan, new_wave, plan
from services.prefill.snapshot import Key, Limits, PromptView, Snapshot, WaveView
from services.prefill.wave_costs import GroupCosts

MAX_PLANS_PER_PROMPT = 4096  # more is no service but a loop that plans and never runs


@dataclass(frozen=True, slots=True, kw_only=True)
class TracePrompt:
    """One arrival. grant_after_s: from its announcement; None: its decode replica never answers. cancel_after_s: from its arrival."""

    name: str
    at_s: float
    num_tokens: int
    priority: int = 0
    peer: str = "d0"
    grant_after_s: float | None = 0.0005
    cancel_after_s: float | None = None
    remaining_s: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What things take, in seconds.

    A layer group over n rows: least_s (its weights are read), or n * row_s where that is more. boundary_s: between two pieces. step_s: a
    decode step, one before each piece while a finished prompt's sequence runs, for decode_s. blocks_back_s: from a wave's end until its
    blocks are free.
    """

    row_s: float
    least_s: float
    boundary_s: float = 0.0
    step_s: float = 0.0
    decode_s: float = 0.0
    blocks_back_s: float = 0.0
    block_tokens: int = 64

    def group_s(self, rows: int) -> float:
        return max(self.least_s, rows * self.row_s)

    def piece_s(self, wave: WaveView, piece: Piece, limits: Limits) -> float:
        chunks = range(*piece.chunks)
        rows = (num_rows(wave, Piece(groups=piece.groups, chunks=(chunk, chunk + 1)), limits) for chunk in chunks)
        return piece.num_groups * sum(self.group_s(one) for one in rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One piece in the step thread. num_live, live_tokens: of all live waves, this one among them."""

    wave_id: int
    piece: Piece
    planned_s: float
    started_s: float
    ended_s: float
    num_live: int
    live_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a prompt ended: "done", "cancelled", or its failure's code. started_s: when its wave's first piece was planned."""

    how: str
    at_s: float
    started_s: float | None


@dataclass(slots=True, kw_only=True)
class Replayed:
    """What came of a trace. waves: as they were formed. most_passes: the most that any live wave was ever passed over."""

    trace: dict[str, TracePrompt]
    ended: dict[str, Ended] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    waves: dict[int, WaveView] = field(default_factory=dict)
    names: dict[int, tuple[str, ...]] = field(default_factory=dict)
    granted_s: dict[str, float] = field(default_factory=dict)
    most_passes: int = 0
    least_free_blocks: int = 0
    num_plans: int = 0

    def ttft_s(self, name: str) -> float:
        """From arrival to the end of its wave."""
        ended = self.ended[name]
        assert ended.how == "done", (name, ended)
        return ended.at_s - self.trace[name].at_s


def trace_of_json(text: bytes | str) -> tuple[TracePrompt, ...]:
    """A recorded trace: a JSON list of prompts by the fields of TracePrompt. Raises msgspec.ValidationError naming what is wrong."""
    return msgspec.json.decode(text, type=tuple[TracePrompt, ...])


def replay(trace: Iterable[TracePrompt], limits: Limits, machine: Machine) -> Replayed:
    """Every prompt of the trace, from its arrival to its end. AssertionError where the policy breaks its contract or stands still."""
    replayer = _Replayer(tuple(trace), limits, machine)
    replayer.run()
    return replayer.found


@dataclass(slots=True)
class _Live:
    """A wave that is not over."""

    view: WaveView
    prompts: tuple[PromptView, ...]
    started_s: float


class _Replayer:
    def __init__(self, trace: tuple[TracePrompt, ...], limits: Limits, machine: Machine) -> None:
        self.found = Replayed(trace={prompt.name: prompt for prompt in trace}, least_free_blocks=limits.num_blocks)
        assert len(self.found.trace) == len(trace), "two prompts have one name"
        self._limits = limits
        self._machine = machine
        self._costs = GroupCosts()
        self._num_free = limits.num_blocks
        self._now_s = 0.0
        self._decoding_until_s = 0.0
        self._waiting: dict[Key, PromptView] = {}
        self._waves: dict[int, _Live] = {}
        self._running: tuple[int, Piece] | None = None
        self._places = itertools.count()
        self._events: list[tuple[float, int, str, str]] = []  # (when, place, what, of whom)
        for prompt in trace:
            self._later(prompt.at_s, "arrives", prompt.name)
            if prompt.cancel_after_s is not None:
                self._later(prompt.at_s + prompt.cancel_after_s, "cancels", prompt.name)

    def run(self) -> None:
        wake_s: float | None = None
        while len(self.found.ended) < len(self.found.trace) or self._waves:
            times = [self._events[0][0]] if self._events else []
            times += [wake_s] if wake_s is not None else []
            assert times, f"stands still at {self._now_s} s: {list(self._waiting)} wait, {list(self._waves)} live"
            self._now_s = max(min(times), self._now_s)
            while self._events and self._events[0][0] <= self._now_s:
                _, _, what, name = heapq.heappop(self._events)
                self._happens(what, name)
            decision = plan(self._snapshot(), self._now_s)
            self.found.num_plans += 1
            assert self.found.num_plans <= MAX_PLANS_PER_PROMPT * len(self.found.trace), "plans and does not end"
            self._apply(decision)
            wake_s = decision.wake_s

    def _later(self, when_s: float, what: str, name: str) -> None:
        heapq.heappush(self._events, (when_s, next(self._places), what, name))

    def _happens(self, what: str, name: str) -> None:
        key = (name, 0)
        if what == "arrives":
            self._arrives(self.found.trace[name])
        elif what == "cancels" and name not in self.found.ended:
            self._waiting.pop(key, None)
            self._end(name, "cancelled", self._started_s(name))
        elif what == "is granted" and key in self._waiting:
            self._waiting[key] = replace(self._waiting[key], is_granted=True)
            self.found.granted_s[name] = self._now_s
        elif what == "blocks are free":
            self._num_free += int(name)
        elif what == "piece ends":
            self._piece_ended()

    def _arrives(self, prompt: TracePrompt) -> None:
        view = PromptView(
            key=(prompt.name, 0),
            peer=prompt.peer,
            num_tokens=prompt.num_tokens,
            num_blocks=-(-prompt.num_tokens // self._machine.block_tokens),
            priority=prompt.priority,
            arrived_s=prompt.at_s,
            deadline_s=prompt.at_s + prompt.remaining_s,
            is_reachable=True,
        )
        self._waiting[view.key] = view

    def _started_s(self, name: str) -> float | None:
        return next((live.started_s for live in self._waves.values() for one in live.prompts if one.key[0] == name), None)

    def _end(self, name: str, how: str, started_s: float | None) -> None:
        self.found.ended[name] = Ended(how=how, at_s=self._now_s, started_s=started_s)

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            prompts=tuple(self._waiting.values()),
            waves=tuple(live.view for live in self._waves.values() if live.view.has_more),
            num_free_blocks=self._num_free,
            is_running=self._running is not None,
            limits=self._limits,
            costs=self._costs.curve,
            is_decoding=self._is_decoding,
        )

    @property
    def _is_decoding(self) -> bool:
        return self._now_s < self._decoding_until_s

    def _apply(self, decision: Plan) -> None:
        for failure in decision.failures:
            del self._waiting[failure.key]
            self._end(failure.key[0], failure.code, None)
        if isinstance(decision.run, NewWave):
            self._form(decision.run)
        elif isinstance(decision.run, NextPiece):
            self._start(self._waves[decision.run.wave_id], decision.run.piece)
        for key in decision.announce:
            view = self._waiting[key]
            assert view.announced_s is None, f"{key} is announced twice"
            self._waiting[key] = replace(view, announced_s=self._now_s)
            delay_s = self.found.trace[key[0]].grant_after_s
            if delay_s is not None:
                self._later(self._now_s + delay_s, "is granted", key[0])

    def _form(self, run: NewWave) -> None:
        prompts = tuple(self._waiting.pop(key) for key in run.keys)
        assert prompts and all(prompt.is_granted for prompt in prompts), "only granted prompts run"
        num_tokens = sum(prompt.num_tokens for prompt in prompts)
        assert len(prompts) == 1 or num_tokens <= self._limits.company_tokens, "more than fit together"
        self._num_free -= sum(prompt.num_blocks for prompt in prompts)
        assert self._num_free >= 0, "blocks that are not there"
        self.found.least_free_blocks = min(self.found.least_free_blocks, self._num_free)
        view = new_wave(len(self.found.waves), prompts, num_tokens, self._limits, self._costs.curve)
        self._waves[view.wave_id] = live = _Live(view, prompts, self._now_s)
        self.found.waves[view.wave_id] = view
        self.found.names[view.wave_id] = tuple(prompt.key[0] for prompt in prompts)
        self._start(live, next_piece(view, self._limits, self._costs.curve, may_run_on=run.may_run_on))

    def _start(self, live: _Live, piece: Piece) -> None:
        assert self._running is None, "a piece started while one was running"
        for other in self._waves.values():
            other.view = replace(other.view, num_passes=0 if other is live else other.view.num_passes + 1)
            self.found.most_passes = max(self.found.most_passes, other.view.num_passes)
        started_s = self._now_s + self._machine.boundary_s + (self._machine.step_s if self._is_decoding else 0.0)
        ended_s = started_s + self._machine.piece_s(live.view, piece, self._limits)
        run = Run(
            wave_id=live.view.wave_id,
            piece=piece,
            planned_s=self._now_s,
            started_s=started_s,
            ended_s=ended_s,
            num_live=len(self._waves),
            live_tokens=sum(one.view.num_tokens for one in self._waves.values()),
        )
        self.found.runs.append(run)
        live.view = advanced(live.view, piece)
        self._running = (live.view.wave_id, piece)
        self._later(ended_s, "piece ends", "")

    def _piece_ended(self) -> None:
        assert self._running is not None
        wave_id, piece = self._running
        self._running = None
        live, run = self._waves[wave_id], self.found.runs[-1]
        self._costs.observe(num_rows(live.view, piece, self._limits), piece.num_groups, run.ended_s - run.started_s)
        wanted = [prompt for prompt in live.prompts if prompt.key[0] not in self.found.ended]
        for prompt in wanted:
            if self._now_s >= prompt.deadline_s:
                self._end(prompt.key[0], "deadline_exceeded", live.started_s)
            elif not live.view.has_more:
                self._end(prompt.key[0], "done", live.started_s)
                self._decoding_until_s = max(self._decoding_until_s, self._now_s + self._machine.decode_s)
        if not live.view.has_more or all(prompt.key[0] in self.found.ended for prompt in live.prompts):
            del self._waves[wave_id]
            self._later(self._now_s + self._machine.blocks_back_s, "blocks are free", str(sum(one.num_blocks for one in live.prompts)))
