"""Owns what prefill does next: who waited too long, which wave runs, whom to announce. PURE: knows no tensor or socket.

A prompt is queued -> announced -> granted -> in a wave -> gone. A **wave** is a set of granted prompts that crosses the model together,
piece by piece (pieces.py); the turn is decided anew at every boundary:

    announce   announcing.py: one piece ahead of the turn
    start      granted prompts in rank order, as many as fit the wave limits and the free blocks, without bypassing: one that does not fit
               waits at the head and nobody behind it starts. Rank: priority, which grows with age; then who can still make its target
               (slack.py), or where gateway.max_ttft_s is told that, by the earliest target; then the late, shortest first
    overtake   prompts of at most a quarter of the smallest live wave's tokens, together at most half of them, go before it as a wave of
               their own, each of them where it saves itself more waiting than it costs the prompts of the wave that would run, if those
               are several; and of the live waves the one with the least left goes first, unless a wave that can still make an earlier
               target would miss it by waiting for them: that one runs
    resume     but whoever was passed over MAX_PASSES times runs before all others, the most passed over first; no wave starts meanwhile

**No starvation.** Live waves halve in size, so there are n <= log2(longest prompt's or wave's tokens) + 1 of them, and between two pieces
of one at most MAX_PASSES + n - 1 pieces of others run. A piece is one group, or ALONE_TARGETS targets at most (pieces.py). In rank a
waiting prompt is passed only by prompts that came less than PRIORITY_AGE_S * (1 + what their priority is higher by) later. Every announced
prompt is granted or failed within grant_timeout_s; every prompt ends by its deadline until it runs, and a wave that runs always ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.prefill.announcing import OVERTAKING_SHARE, announcements, may_overtake
from services.prefill.pieces import Piece, advanced, next_piece
from services.prefill.slack import due_s, left_s, slack_s, target_s, work_s
from services.prefill.snapshot import Key, Limits, PromptView, Snapshot, WaveView
from services.prefill.wave_costs import CostCurve

MAX_PASSES = 8  # eight short waves go first, each one piece where nobody could overtake it; the ninth waits
PRIORITY_AGE_S = 2.0  # a prompt gains one level of priority for each such span of waiting
GATHER_S = 0.003  # grants of prompts announced together arrive within a few socket round trips: wait for them before starting


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A prompt that ends here, with what the gateway is told."""

    key: Key
    code: str
    phase: str
    is_retryable: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewWave:
    """Form a wave of these prompts and run its first piece (pieces.next_piece, once it is known who really joins)."""

    keys: tuple[Key, ...]
    may_run_on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NextPiece:
    """Run this piece of this wave."""

    wave_id: int
    piece: Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """wake_s: plan again at this time at the latest, None when only an event can change anything."""

    failures: tuple[Failure, ...]
    announce: tuple[Key, ...]
    run: NewWave | NextPiece | None
    wake_s: float | None


def plan(snapshot: Snapshot, now_s: float) -> Plan:
    """Decide the next step of this replica."""
    failures = tuple(failure for prompt in snapshot.prompts if (failure := _failure(prompt, snapshot.limits, now_s)) is not None)
    failed = {failure.key for failure in failures}
    prompts = sorted((prompt for prompt in snapshot.prompts if prompt.key not in failed), key=lambda prompt: _rank(prompt, snapshot, now_s))
    gathering_until_s = _gathering_until_s(prompts, snapshot, now_s)
    run = None if snapshot.is_running or gathering_until_s is not None else _next_run(prompts, snapshot, now_s)
    started = set(run.keys) if isinstance(run, NewWave) else set()
    waiting = [prompt for prompt in prompts if prompt.key not in started]
    announce = announcements(waiting, _waves_after(run, prompts, snapshot), snapshot)
    wake_s = _wake_s(waiting, set(announce), snapshot.limits, now_s)
    if gathering_until_s is not None:
        wake_s = gathering_until_s if wake_s is None else min(wake_s, gathering_until_s)
    return Plan(failures=failures, announce=announce, run=run, wake_s=wake_s)


def new_wave(wave_id: int, prompts: Sequence[PromptView], num_tokens: int, limits: Limits, costs: CostCurve) -> WaveView:
    """A wave of these prompts before its first piece. num_tokens: what is computed of them."""
    return WaveView(
        wave_id=wave_id,
        num_tokens=num_tokens,
        num_prompts=len(prompts),
        num_groups=limits.num_groups,
        num_chunks=limits.num_chunks_of(num_tokens),
        target_s=min(target_s(prompt, limits, costs) for prompt in prompts),
    )


def _rank(prompt: PromptView, snapshot: Snapshot, now_s: float) -> tuple[int, bool, float, float, Key]:
    aged_priority = prompt.priority + int(max(now_s - prompt.arrived_s, 0.0) / PRIORITY_AGE_S)
    alone_s = work_s(prompt.num_tokens, snapshot.limits, snapshot.costs)
    target = due_s(prompt.arrived_s, alone_s, snapshot.limits)
    max_ttft_s = snapshot.limits.max_ttft_s
    is_late = (target if max_ttft_s is None else max(target, prompt.arrived_s + max_ttft_s)) - now_s < alone_s
    return (-aged_priority, is_late, alone_s if is_late else target, prompt.arrived_s, prompt.key)


def _failure(prompt: PromptView, limits: Limits, now_s: float) -> Failure | None:
    if prompt.num_blocks > limits.num_blocks:
        has = f"this replica has {limits.num_blocks} (prefill.num_blocks; on a GPU what gpu_memory_fraction leaves beside the weights)"
        detail = f"the prompt needs {prompt.num_blocks} KV blocks, {has}"
        return Failure(key=prompt.key, code="prompt_too_long", phase="prefill.queue", is_retryable=False, detail=detail)
    if now_s >= prompt.deadline_s:
        detail = "the deadline passed before the prompt's first layer group"
        return Failure(key=prompt.key, code="deadline_exceeded", phase="prefill.queue", is_retryable=False, detail=detail)
    if prompt.announced_s is not None and not prompt.is_granted and now_s >= prompt.announced_s + limits.grant_timeout_s:
        detail = f"the decode replica granted no room within {limits.grant_timeout_s:g} s"
        return Failure(key=prompt.key, code="no_grant", phase="kv.handoff", is_retryable=True, detail=detail)
    return None


def _gathering_until_s(prompts: Sequence[PromptView], snapshot: Snapshot, now_s: float) -> float | None:
    """Until when an idle replica waits for the grants of prompts that were announced together; None: it need not."""
    if snapshot.waves or snapshot.is_running:
        return None
    granted = _fill(prompts, snapshot.limits.company_tokens, snapshot)
    if not granted or len(granted) == snapshot.limits.max_wave_prompts:
        return None
    expected_s = [prompt.announced_s + GATHER_S for prompt in prompts if prompt.announced_s is not None and not prompt.is_granted]
    until_s = max(expected_s, default=now_s)
    return until_s if until_s > now_s else None


def _next_run(prompts: Sequence[PromptView], snapshot: Snapshot, now_s: float) -> NewWave | NextPiece | None:
    live = [wave for wave in snapshot.waves if wave.has_more]
    if not live:
        keys = _fill(prompts, snapshot.limits.company_tokens, snapshot)
        return _start(keys, prompts, snapshot) if keys else None
    overdue = [wave for wave in live if wave.num_passes >= MAX_PASSES]
    if overdue:
        return _resume(max(overdue, key=lambda wave: (wave.num_passes, -wave.wave_id)), prompts, snapshot)
    limits, costs = snapshot.limits, snapshot.costs
    shortest = min(live, key=lambda wave: (left_s(wave, limits, costs), wave.num_tokens, wave.wave_id))
    keys = _overtaking(prompts, live, shortest, snapshot)
    first = _formed(keys, prompts, snapshot) if keys else shortest
    first_s = left_s(first, limits, costs)
    missing = [wave for wave in live if wave.target_s < first.target_s and 0 <= slack_s(wave, limits, costs, now_s) < first_s]
    if missing:
        return _resume(min(missing, key=lambda wave: (wave.target_s, wave.wave_id)), prompts, snapshot)
    return _start(keys, prompts, snapshot) if keys else _resume(shortest, prompts, snapshot)


def _overtaking(prompts: Iterable[PromptView], live: Sequence[WaveView], shortest: WaveView, snapshot: Snapshot) -> tuple[Key, ...]:
    """Who goes before the live waves as a wave of their own. shortest: of these the one that runs otherwise."""
    limits, costs = snapshot.limits, snapshot.costs
    smallest = min(wave.num_tokens for wave in live)
    room = limits.max_live_tokens - sum(wave.num_tokens for wave in live)
    longest = min(room, smallest // OVERTAKING_SHARE)
    short = [prompt for prompt in prompts if prompt.num_tokens <= longest and may_overtake(prompt, shortest, limits, costs)]
    return _fill(short, min(smallest // 2, limits.company_tokens, room), snapshot)


def _fill(prompts: Iterable[PromptView], max_tokens: int, snapshot: Snapshot) -> tuple[Key, ...]:
    """The granted prompts at the head that fit together. One prompt beyond max_tokens may go alone."""
    keys: list[Key] = []
    num_tokens = num_blocks = 0
    for prompt in prompts:
        if not prompt.is_granted:
            continue
        num_tokens += prompt.num_tokens
        num_blocks += prompt.num_blocks
        if len(keys) == snapshot.limits.max_wave_prompts or num_blocks > snapshot.num_free_blocks:
            break
        if keys and num_tokens > max_tokens:
            break
        keys.append(prompt.key)
    return tuple(keys)


def _start(keys: tuple[Key, ...], prompts: Sequence[PromptView], snapshot: Snapshot) -> NewWave:
    """It is the smallest of the live waves."""
    wave = _formed(keys, prompts, snapshot)
    started = set(keys)
    may_wait = any(may_overtake(prompt, wave, snapshot.limits, snapshot.costs) for prompt in prompts if prompt.key not in started)
    return NewWave(keys=keys, may_run_on=not (snapshot.is_decoding or may_wait))


def _resume(wave: WaveView, prompts: Sequence[PromptView], snapshot: Snapshot) -> NextPiece:
    """The wave may run on where no boundary would be used: nothing is decoded, and nobody is there who could overtake it."""
    may_be_overtaken = any(other.num_tokens < wave.num_tokens for other in snapshot.waves if other.has_more)
    may_be_overtaken = may_be_overtaken or any(may_overtake(prompt, wave, snapshot.limits, snapshot.costs) for prompt in prompts)
    piece = next_piece(wave, snapshot.limits, snapshot.costs, may_run_on=not (snapshot.is_decoding or may_be_overtaken))
    return NextPiece(wave_id=wave.wave_id, piece=piece)


def _formed(keys: tuple[Key, ...], prompts: Sequence[PromptView], snapshot: Snapshot) -> WaveView:
    """The wave of these prompts as far as it is known before it has its blocks."""
    chosen = set(keys)
    joining = [prompt for prompt in prompts if prompt.key in chosen]
    return new_wave(-1, joining, sum(prompt.num_tokens for prompt in joining), snapshot.limits, snapshot.costs)


def _waves_after(run: NewWave | NextPiece | None, prompts: Sequence[PromptView], snapshot: Snapshot) -> tuple[WaveView, ...]:
    """The live waves once the chosen piece has begun."""
    if isinstance(run, NextPiece):
        return tuple(advanced(wave, run.piece) if wave.wave_id == run.wave_id else wave for wave in snapshot.waves)
    if run is None:
        return snapshot.waves
    wave = _formed(run.keys, prompts, snapshot)
    return (*snapshot.waves, advanced(wave, next_piece(wave, snapshot.limits, snapshot.costs, may_run_on=run.may_run_on)))


def _wake_s(prompts: Iterable[PromptView], announced_now: set[Key], limits: Limits, now_s: float) -> float | None:
    times: list[float] = []
    for prompt in prompts:
        times.append(prompt.deadline_s)
        if prompt.key in announced_now:
            times.append(now_s + limits.grant_timeout_s)
        elif prompt.announced_s is not None and not prompt.is_granted:
            times.append(prompt.announced_s + limits.grant_timeout_s)
    return min(times, default=None)
