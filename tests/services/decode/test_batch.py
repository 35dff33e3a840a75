"""The batch over a device that does what was queued in order, answered at once or one step late: random joins, ends, cancels, preemptions.

The device's next token is a hash of what the row's blocks hold, so that whoever writes into another's blocks changes its tokens.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from duomo.engine.blocks import BlockManager
from duomo.engine.decode_step import Joining
from duomo.engine.sampler import SampledToken
from duomo.wire.messages import PrefillDone, Resume, StartDecode
from duomo.wire.values import PeerAddress, Sampling
from services.decode.batch import Batch, BatchEnds, PlannedStep, Stops
from services.decode.leg import Choice, Leg, LegState
from services.decode.policy import DecodeLimits, plan_grants
from services.decode.pool import CacheTerms, Pool
from services.decode.worker import StepInput
from services.kv_transfer.loans import BlockLoans

LIMITS = DecodeLimits(num_blocks=14, block_tokens=4, watermark_blocks=0, admit_ahead_tokens=1, max_batch=4, max_preemptions=2)
MAX_MODEL_TOKENS = 30
STOP_ID, EOS_ID = 5, 6
NOWHERE = PeerAddress(replica_id="p", boot_id="p", address="unix:/nowhere")
NO_ROUTES = np.zeros((LIMITS.max_batch, 1), np.int16)


def token_after(token_ids: Sequence[int], choice: int) -> int:
    return zlib.crc32(bytes(token_ids) + bytes([choice])) % 60


def is_last(request: Request, tokens: Sequence[int]) -> bool:
    """Whether a choice ends with the last of these."""
    is_stop = tokens[-1] in (STOP_ID, EOS_ID) and len(tokens) > request.sampling.min_tokens
    return is_stop or len(tokens) >= request.sampling.max_tokens or len(request.prompt_ids) + len(tokens) >= MAX_MODEL_TOKENS


@dataclass
class Device:
    """What each place of each block holds. row_of: who has which row of the step queued last, and its token."""

    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    rows: list[tuple[int, int]] = field(default_factory=list)

    def write(self, table: Sequence[int], position: int, token_id: int) -> None:
        self.memory[table[position // LIMITS.block_tokens], position % LIMITS.block_tokens] = token_id

    def read(self, table: Sequence[int], num_tokens: int) -> list[int]:
        places = (divmod(position, LIMITS.block_tokens) for position in range(num_tokens))
        return [self.memory.get((table[block], offset), 255) for block, offset in places]

    def step(self, work: StepInput) -> list[int]:
        """Queue a step, which here is to run it."""
        for source, target in work.copies:
            for offset in range(LIMITS.block_tokens):
                self.memory[target, offset] = self.memory.get((source, offset), 255)
        if not work.rows:
            return []
        assert len(work.rows) <= LIMITS.max_batch
        named = [row.source for row in work.rows if isinstance(row.source, int)]
        assert len(set(named)) == len(named), "two rows feed on one"
        fed = [
            (row.source.token_id, row.source.sampling.choice) if isinstance(row.source, Joining) else self.rows[row.source]
            for row in work.rows
        ]
        for (token_id, _), row in zip(fed, work.rows, strict=True):
            assert row.position < MAX_MODEL_TOKENS
            self.write(row.table, row.position, token_id)
        tokens = [token_after(self.read(row.table, row.position + 1), choice) for (_, choice), row in zip(fed, work.rows, strict=True)]
        self.rows = [(token, choice) for token, (_, choice) in zip(tokens, fed, strict=True)]
        return tokens


@dataclass
class Request:
    """One request and what each of its choices was given."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    tokens: dict[int, list[int]]
    cancelled: set[int] = field(default_factory=set)
    attempt: int = 0
    salt: str = ""


class Play:
    """A decode service's life without sockets: what service.py and handoff.py do to the batch, in their order."""

    def __init__(self, seed: int, lag: int) -> None:
        self.random = random.Random(seed)
        self.device = Device()
        self.is_shared, self.salts = seed % 2 == 1, dict[int, str]()
        num_cached = (None, 8, 3, 0)[seed // 2 % 4]
        loans = (
            BlockLoans("d", BlockManager(LIMITS.num_blocks, LIMITS.block_tokens, max_cached_blocks=num_cached)) if self.is_shared else None
        )
        self.pool = Pool(LIMITS, loans, CacheTerms(max_blocks=num_cached, keeps_answers=seed % 5 > 0))
        ends = BatchEnds(preempted=self.preempted, finished=self.close)
        self.batch = Batch(self.pool, Stops(eos_ids=(EOS_ID,), max_model_tokens=MAX_MODEL_TOKENS), ends)
        self.requests: dict[str, Request] = {}
        self.waiting: list[Leg] = []
        self.granted: list[Leg] = []
        self.running: list[Leg] = []
        self.num_preempted = self.num_ahead = self.num_found = 0
        self._lag = lag
        self._out: deque[tuple[PlannedStep, list[int]]] = deque()
        self._leg_ids = iter(range(10**9))

    def start(self) -> None:
        number, length = len(self.requests), self.random.randrange(1, 15)
        common, salt = self.beginning()
        sampling = Sampling(
            max_tokens=self.random.randrange(1, 28), min_tokens=self.random.randrange(3), stop_token_ids=(STOP_ID,), seed=number
        )
        choices = tuple(range(self.random.choice((1, 1, 2, 3))))
        prompt_ids = (*common, *(self.random.randrange(60) for _ in range(length)))[: MAX_MODEL_TOKENS - 1]
        request = Request(f"r{number}", prompt_ids, sampling, {choice: [] for choice in choices}, salt=salt)
        self.requests[request.request_id] = request
        fields = {"request_id": request.request_id, "attempt": 0, "traceparent": "", "remaining_s": 1.0, "prefill": NOWHERE}
        self.expect(
            StartDecode(**fields, prompt_ids=prompt_ids, sampling=sampling, choices=choices, cache_salt=request.salt)  # type: ignore[arg-type]  # one dict for several fields
        )

    def beginning(self) -> tuple[list[int], str]:
        """Nothing in common with others, blocks that many prompts share, or an earlier turn and its answer; and whose key."""
        kind, salt = self.random.random(), self.random.choice(("", "key"))
        if kind < 0.3 or not self.requests:
            return [], salt
        if kind < 0.5:
            return [7] * 8, salt
        earlier = self.random.choice(list(self.requests.values())[-8:])
        turn = [*earlier.prompt_ids, *earlier.tokens[self.random.choice(list(earlier.tokens))]]
        return turn[: self.random.choice((8, len(turn), len(turn)))], self.random.choice((salt, earlier.salt, earlier.salt))

    def expect(self, message: StartDecode | Resume) -> None:
        leg = Leg.of(message, leg_id=next(self._leg_ids), gateway="g", now_s=0.0, max_preemptions=LIMITS.max_preemptions)
        leg.state = LegState.WAITING
        self.waiting.append(leg)

    def grant(self) -> None:
        plan = plan_grants(LIMITS, self.pool.view(), [leg.waiting() for leg in self.waiting])
        assert not plan.never_fit
        for grant, leg in zip(plan.grants, list(self.waiting), strict=False):
            assert grant.leg_id == leg.leg_id
            table = self.pool.take_prompt(leg.token_ids, leg.cache_salt)
            leg.blocks, leg.cached_tokens, leg.promise_blocks = list(table.blocks), table.cached_tokens, grant.promised_blocks
            leg.prefix_hashes = table.hashes
            self.num_found += table.cached_tokens > 0
            self.check_found(leg)
            leg.order, leg.state = leg.leg_id, LegState.GRANTED
            self.pool.holders[leg.leg_id] = leg
            self.waiting.remove(leg)
            self.granted.append(leg)

    def check_found(self, leg: Leg) -> None:
        num_found = leg.cached_tokens // LIMITS.block_tokens
        held = self.device.read(leg.blocks, leg.cached_tokens)
        assert held == list(leg.token_ids[: leg.cached_tokens]), "what was found at the grant holds other tokens"
        assert {self.salts[block] for block in leg.blocks[:num_found]} <= {leg.cache_salt}, "another key's blocks were found"
        self.salts.update(dict.fromkeys(leg.blocks, leg.cache_salt))

    def land_wrongly(self, leg: Leg) -> None:
        """A message that does not match its hash lies in the blocks that are sent; it is written again, or the leg ends."""
        self.device.write(leg.blocks, self.random.randrange(leg.cached_tokens, leg.num_tokens), 61)

    def break_row(self) -> None:
        """A running leg's row has no token: whatever only it reads is wrong, and must never be found."""
        if not self.running:
            return
        leg = self.random.choice(self.running)
        self.pool.distrust(leg)
        for choice in leg.choices.values():
            for block in choice.table:
                if self.pool.manager.num_sole([block]):
                    for offset in range(LIMITS.block_tokens):
                        self.device.memory[block, offset] = 61
        self.requests[leg.request_id].cancelled.update(leg.choices)
        self.close(leg)

    def prefill(self, leg: Leg) -> None:
        """Its group is queued behind every step so far."""
        request = self.requests[leg.request_id]
        for position in range(leg.cached_tokens, leg.num_tokens):
            self.device.write(leg.blocks, position, leg.token_ids[position])
        seen = self.device.read(leg.blocks, leg.num_tokens)
        if self.is_shared:  # prefill's own commit; it is decode's where the prompt has landed
            self.pool.manager.commit(leg.blocks, leg.prefix_hashes)
        firsts = tuple(token_after(seen, choice) for choice in leg.choice_numbers)
        ended = []
        for choice, token_id in zip(leg.choice_numbers, firsts, strict=True):
            if choice not in request.cancelled:
                request.tokens[choice].append(token_id)
                if is_last(request, request.tokens[choice]):
                    ended.append(choice)
        fields = {"request_id": leg.request_id, "attempt": leg.attempt, "traceparent": "", "remaining_s": 1.0, "handle_id": 1}
        leg.done = PrefillDone(**fields, num_messages=0, first_token_ids=firsts, ended_choices=tuple(ended), cached_tokens=0)  # type: ignore[arg-type]  # one dict for several fields
        self.granted.remove(leg)
        self.running.append(leg)
        self.batch.join(leg)

    def cancel(self) -> None:
        legs = self.waiting + self.granted + self.running
        if not legs:
            return
        leg = self.random.choice(legs)
        request = self.requests[leg.request_id]
        live = tuple(leg.choices) if leg.state is LegState.RUNNING else leg.choice_numbers  # others went on in another leg
        numbers = live if self.random.random() < 0.5 else live[:1]
        for number in numbers:
            request.cancelled.add(number)
            leg.cancelled_choices.add(number)
            if number in leg.choices:
                self.batch.remove(leg.choices[number])
        is_over = leg.cancelled_choices.issuperset(leg.choice_numbers) if leg.state is not LegState.RUNNING else not leg.choices
        if is_over:
            self.close(leg)

    def preempted(self, choice: Choice) -> None:
        self.num_preempted += 1
        leg, request = choice.leg, self.requests[choice.leg.request_id]
        assert request.tokens[choice.number] == choice.output_ids
        request.attempt += 1
        fields = {"request_id": leg.request_id, "attempt": leg.attempt + 1, "traceparent": "", "remaining_s": 1.0, "prefill": NOWHERE}
        emitted = tuple(choice.output_ids)
        self.expect(
            Resume(
                **fields,  # type: ignore[arg-type]  # one dict for several fields
                prompt_ids=request.prompt_ids,
                emitted_ids=emitted,
                sampling=request.sampling,
                choice=choice.number,
                cache_salt=request.salt,
            )
        )
        if not leg.choices:
            self.close(leg)

    def close(self, leg: Leg) -> None:
        for legs in (self.waiting, self.granted, self.running):
            if leg in legs:
                legs.remove(leg)
        for choice in list(leg.choices.values()):
            self.batch.remove(choice)
        self.pool.give_back(leg.blocks)
        leg.blocks, leg.state = [], LegState.OVER
        self.pool.holders.pop(leg.leg_id, None)

    def turn(self) -> None:
        """One turn of the step loop; messages come before it, and between its launch and its answer."""
        self.grant()
        step = self.batch.plan()
        for choice in step.rows:
            self.salts.update(dict.fromkeys(choice.table, choice.leg.cache_salt))
        self.num_ahead += any(isinstance(row.source, int) for row in step.work.rows)
        if not step.is_empty:
            self._out.append((step, self.device.step(step.work)))
        if self.random.random() < 0.1:
            self.cancel()
        if len(self._out) > (0 if step.is_empty else self._lag):
            self.apply(*self._out.popleft())

    def apply(self, step: PlannedStep, tokens: Sequence[int]) -> None:
        sampled = [SampledToken(token_id=token) for token in tokens]
        for choice, token in self.batch.apply(step, sampled, NO_ROUTES):
            request = self.requests[token.request_id]
            assert token.index == len(request.tokens[token.choice]), "a token came twice, or one is missing"
            request.tokens[token.choice].append(token.token_id)
            assert (token.finish_reason is not None) == is_last(request, request.tokens[token.choice])
            if token.finish_reason is not None and not choice.leg.choices:
                self.close(choice.leg)

    @property
    def is_over(self) -> bool:
        return not (self.waiting or self.granted or self.running or self._out)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seeds", [range(at, at + 10) for at in range(0, 40, 10)], ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_random_lives_give_everybody_their_tokens_and_every_block_back(seeds: range, lag: int) -> None:
    num_preempted = num_ahead = num_found = num_evicted = 0
    for seed in seeds:
        play = Play(seed, lag)
        for _ in range(250):
            if len(play.requests) < 60 and play.random.random() < 0.4:
                play.start()
            if play.random.random() < 0.05:
                play.cancel()
            if play.random.random() < 0.03:
                play.break_row()
            for leg in list(play.granted):
                if play.random.random() < 0.5:
                    play.prefill(leg)
                elif not play.is_shared:
                    play.land_wrongly(leg)
            play.turn()
        while not play.is_over:
            for leg in list(play.granted):
                play.prefill(leg)
            play.turn()
        play.pool.check_integrity()
        assert play.pool.num_free_blocks == LIMITS.num_blocks
        for request in play.requests.values():
            for choice, tokens in request.tokens.items():
                so_far = list(request.prompt_ids)
                for token in tokens:
                    assert token == token_after(so_far, choice), (seed, request.request_id, choice)
                    so_far.append(token)
                assert choice in request.cancelled or is_last(request, tokens), (seed, request.request_id, choice)
        num_preempted += play.num_preempted
        num_ahead += play.num_ahead
        num_found += play.num_found
        num_evicted += play.pool.counters["prefix_blocks_evicted"]
    assert num_preempted > 10, "nobody gave way: the test shows nothing"
    assert num_found > 20 and num_evicted > 20, "nothing was found, or nothing gave way: the test shows nothing"
    assert (num_ahead > 1000) == bool(lag)
