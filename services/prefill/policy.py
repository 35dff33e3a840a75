"""Owns what prefill does next: whom to announce, which (wave, layer group) runs, who waited too long. PURE: knows no tensor or socket.

A prompt is queued -> announced -> granted -> in a wave -> gone. A **wave** is a set of granted prompts that crosses the layers
together, group by group; the turn is decided anew at every group boundary, so that a short prompt overtakes a long wave:

    announce   everybody, when no live wave has more than one group left (one group ahead of the turn; at once when idle);
               while a wave has more to go, only prompts short enough to overtake it
    start      granted prompts, by priority and age, as many as fit the wave limits and the free blocks, without bypassing:
               a prompt that does not fit waits at the head and nobody behind it starts
    overtake   prompts of at most a quarter of the smallest live wave's tokens, together at most half of them, start before its next group
    resume     the smallest live wave, unless another was passed over MAX_PASSES times

Bounds: between two groups of a wave at most MAX_PASSES + (live waves) others run; live waves halve in size, so there are at
most log2(max_wave_tokens) + 1 of them; priority ages, so that no class starves another; every announced prompt is granted or failed
within grant_timeout_s; every prompt ends by its deadline until it runs, and a wave that runs always ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_PASSES = 8  # two short waves of four groups go first; the third waits
OVERTAKING_SHARE = 4  # a prompt this many times smaller overtakes; larger ones gain more from sharing a wave with each other
PRIORITY_AGE_S = 2.0  # a prompt gains one level of priority for each such span of waiting
GATHER_S = 0.003  # grants of prompts announced together arrive within a few socket round trips: wait for them before starting

Key = tuple[str, int]  # (request id, attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """A prompt that is not in a wave yet. peer: boot id of the decode replica that grants. is_reachable: its ring is attached."""

    key: Key
    peer: str
    num_tokens: int
    num_blocks: int
    priority: int
    arrived_s: float
    deadline_s: float
    is_reachable: bool
    announced_s: float | None = None
    is_granted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WaveView:
    """A live wave. next_group: the first group that has neither run nor is running. num_passes: groups of others since its own last one."""

    wave_id: int
    num_tokens: int
    next_group: int
    num_groups: int
    num_passes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """num_blocks: all blocks of this replica."""

    max_wave_tokens: int
    max_wave_prompts: int
    num_groups: int
    num_blocks: int
    grant_timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything the policy may know. is_running: a group is in the step thread now, so none may start."""

    prompts: tuple[PromptView, ...]
    waves: tuple[WaveView, ...]
    num_free_blocks: int
    is_running: bool
    limits: Limits


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
    """Form a wave of these prompts and run its first group."""

    keys: tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextGroup:
    """Run the next group of this wave."""

    wave_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """wake_s: plan again at this time at the latest, None when only an event can change anything."""

    failures: tuple[Failure, ...]
    announce: tuple[Key, ...]
    run: NewWave | NextGroup | None
    wake_s: float | None


def plan(snapshot: Snapshot, now_s: float) -> Plan:
    """Decide the next step of this replica."""
    failures = tuple(failure for prompt in snapshot.prompts if (failure := _failure(prompt, snapshot.limits, now_s)) is not None)
    failed = {failure.key for failure in failures}
    prompts = sorted((prompt for prompt in snapshot.prompts if prompt.key not in failed), key=lambda prompt: _rank(prompt, now_s))
    gathering_until_s = _gathering_until_s(prompts, snapshot, now_s)
    run = None if snapshot.is_running or gathering_until_s is not None else _next_run(prompts, snapshot)
    started = set(run.keys) if isinstance(run, NewWave) else set()
    waiting = [prompt for prompt in prompts if prompt.key not in started]
    announce = _announcements(waiting, snapshot, run)
    wake_s = _wake_s(waiting, set(announce), snapshot.limits, now_s)
    if gathering_until_s is not None:
        wake_s = gathering_until_s if wake_s is None else min(wake_s, gathering_until_s)
    return Plan(failures=failures, announce=announce, run=run, wake_s=wake_s)


def _rank(prompt: PromptView, now_s: float) -> tuple[int, float, Key]:
    aged_priority = prompt.priority + int(max(now_s - prompt.arrived_s, 0.0) / PRIORITY_AGE_S)
    return (-aged_priority, prompt.arrived_s, prompt.key)


def _failure(prompt: PromptView, limits: Limits, now_s: float) -> Failure | None:
    if prompt.num_blocks > limits.num_blocks:
        detail = f"the prompt needs {prompt.num_blocks} KV blocks and prefill.num_blocks is {limits.num_blocks}"
        return Failure(key=prompt.key, code="prompt_too_long", phase="prefill.queue", is_retryable=False, detail=detail)
    if now_s >= prompt.deadline_s:
        detail = "the deadline passed before the prompt's first layer group"
        return Failure(key=prompt.key, code="deadline_exceeded", phase="prefill.queue", is_retryable=False, detail=detail)
    if prompt.announced_s is not None and not prompt.is_granted and now_s >= prompt.announced_s + limits.grant_timeout_s:
        detail = f"the decode replica granted no room within {limits.grant_timeout_s:g} s"
        return Failure(key=prompt.key, code="no_grant", phase="kv.handoff", is_retryable=True, detail=detail)
    return None


def _gathering_until_s(prompts: Iterable[PromptView], snapshot: Snapshot, now_s: float) -> float | None:
    """Until when an idle replica waits for the grants of prompts that were announced together; None: it need not."""
    if snapshot.waves or snapshot.is_running:
        return None
    granted = _fill(prompts, snapshot.limits.max_wave_tokens, snapshot)
    if not granted or len(granted) == snapshot.limits.max_wave_prompts:
        return None
    expected_s = [prompt.announced_s + GATHER_S for prompt in prompts if prompt.announced_s is not None and not prompt.is_granted]
    until_s = max(expected_s, default=now_s)
    return until_s if until_s > now_s else None


def _next_run(prompts: Iterable[PromptView], snapshot: Snapshot) -> NewWave | NextGroup | None:
    if not snapshot.waves:
        keys = _fill(prompts, snapshot.limits.max_wave_tokens, snapshot)
        return NewWave(keys=keys) if keys else None
    overdue = [wave for wave in snapshot.waves if wave.num_passes >= MAX_PASSES]
    if overdue:
        return NextGroup(wave_id=min(overdue, key=lambda wave: wave.wave_id).wave_id)
    smallest = min(snapshot.waves, key=lambda wave: (wave.num_tokens, wave.wave_id))
    short = [prompt for prompt in prompts if _overtakes(prompt, smallest)]
    keys = _fill(short, smallest.num_tokens // 2, snapshot)
    return NewWave(keys=keys) if keys else NextGroup(wave_id=smallest.wave_id)


def _overtakes(prompt: PromptView, wave: WaveView) -> bool:
    return OVERTAKING_SHARE * prompt.num_tokens <= wave.num_tokens


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


def _announcements(prompts: Iterable[PromptView], snapshot: Snapshot, run: NewWave | NextGroup | None) -> tuple[Key, ...]:
    """Who is announced now: at most one wave's worth for each decode replica, counted in rank order, nobody bypassed."""
    limits = snapshot.limits
    groups_left = sum(wave.num_groups - wave.next_group for wave in snapshot.waves)
    if isinstance(run, NextGroup):
        groups_left -= 1
    elif isinstance(run, NewWave):
        groups_left += limits.num_groups - 1
    is_near = groups_left <= 1
    smallest = min(snapshot.waves, key=lambda wave: wave.num_tokens, default=None)
    budgets: dict[tuple[str, bool], _Budget] = {}
    announce: list[Key] = []
    for prompt in prompts:
        may_overtake = smallest is not None and _overtakes(prompt, smallest)
        budget = budgets.setdefault((prompt.peer, may_overtake), _Budget())
        if prompt.announced_s is not None:
            budget.take(prompt)
        elif prompt.is_reachable and (is_near or may_overtake) and budget.admits(prompt, limits):
            budget.take(prompt)
            announce.append(prompt.key)
    return tuple(announce)


@dataclass(slots=True)
class _Budget:
    """What one decode replica has been asked for. Overtaking prompts have their own, so that waiting long ones never hold them up."""

    num_prompts: int = 0
    num_tokens: int = 0
    is_full: bool = False

    def take(self, prompt: PromptView) -> None:
        self.num_prompts += 1
        self.num_tokens += prompt.num_tokens

    def admits(self, prompt: PromptView, limits: Limits) -> bool:
        """Once one prompt did not fit, nobody behind it does: announcements keep their order."""
        is_first = self.num_prompts == 0
        is_small = self.num_prompts < limits.max_wave_prompts and self.num_tokens + prompt.num_tokens <= limits.max_wave_tokens
        self.is_full = self.is_full or not (is_first or is_small)
        return not self.is_full


def _wake_s(prompts: Iterable[PromptView], announced_now: set[Key], limits: Limits, now_s: float) -> float | None:
    times: list[float] = []
    for prompt in prompts:
        times.append(prompt.deadline_s)
        if prompt.key in announced_now:
            times.append(now_s + limits.grant_timeout_s)
        elif prompt.announced_s is not None and not prompt.is_granted:
            times.append(prompt.announced_s + limits.grant_timeout_s)
    return min(times, default=None)
