"""The decode service over a worker that answers one step late: every scenario of a prompt one, and what only being late can break."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from duomo.config import DuomoConfig
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.errors import EngineError, RequestError
from duomo.wire.messages import GroupLanded
from duomo.wire.values import Sampling
from services.decode.arrivals import LandedMessage
from services.decode.batch import Batch
from services.decode.leg import Leg
from services.decode.steps import StepLoop
from services.decode.worker import StepInput, StepOutput, StepWorker
from services.kv_transfer.layout import MessageSpan
from services.prefill.worker import PrefillWorker, WorkerSizes
from tests.services.decode import rig as rigs
from tests.services.decode import test_service as prompt_scenarios
from tests.services.decode.late_worker import LateWorker
from tests.services.decode.rig import configuration, running, serve
from tests.services.decode.scripted_peers import GREEDY, Prompt, expected, ids, model, until, with_max
from tests.services.pair_rig import WorkerMakers, system

SCENARIOS = [
    prompt_scenarios.test_tokens_equal_the_monolith,
    prompt_scenarios.test_one_frame_a_step_serves_all_streams,
    prompt_scenarios.test_three_choices_fork_one_prompt,
    prompt_scenarios.test_eos_and_stop_ids_end_a_choice,
    prompt_scenarios.test_choices_that_ended_on_prefill_are_not_decoded,
    prompt_scenarios.test_the_death_of_a_gateway_ends_its_requests_within_a_second,
    prompt_scenarios.test_cancel_returns_everything_at_every_stage,
    prompt_scenarios.test_one_choice_can_be_cancelled,
    prompt_scenarios.test_preempted_choices_resume_with_equal_tokens,
    prompt_scenarios.test_drain_finishes_streams_and_takes_no_new,
    prompt_scenarios.test_a_broken_step_answers_every_request,
]


@pytest.fixture(autouse=True)
def _late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rigs, "DecodeWorker", LateWorker)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__.removeprefix("test_"))
def test_a_late_answer_changes_nothing(scenario: Callable[[Path], None], tmp_path: Path) -> None:
    scenario(tmp_path)


def test_no_row_is_run_beyond_a_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice whose token in flight is its last is not planned again: as many rows as tokens, where no id ends a choice."""
    num_rows: list[int] = []
    run = LateWorker.run

    def counted(self: LateWorker, step: StepInput) -> StepOutput | None:
        num_rows.append(len(step.rows))
        time.sleep(0.02)  # so that rows have company, however slow this machine is
        return run(self, step)

    monkeypatch.setattr(LateWorker, "run", counted)

    async def go() -> None:
        async with running(configuration(tmp_path, {"decode": {"max_batch": 2}})) as rig:
            prompts = [Prompt(f"r{number}", 0, ids(5 + number, number), with_max(GREEDY, 12 + number)) for number in range(5)]
            for prompt in prompts:
                rig.gateway.start(prompt, rig.prefill)
            await asyncio.gather(*(rig.prefill.prefill(prompt) for prompt in prompts))
            for prompt in prompts:
                await rig.gateway.finished(prompt.request_id)
                assert rig.gateway.answers[prompt.request_id].ids() == expected(prompt.prompt_ids, prompt.sampling)[1:]
            await rig.at_rest()
            assert sum(num_rows) == rig.service.counters["tokens"] == sum(11 + number for number in range(5))
            assert max(num_rows) == 2

    asyncio.run(go())


def test_a_row_without_a_token_fails_its_leg_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[StepOutput] = []
    run = LateWorker.run

    def poisoned(self: LateWorker, step: StepInput) -> StepOutput | None:
        output = run(self, step)
        if output is not None and len(output.tokens) == 2 and len(finished) < 3:
            finished.append(output)
            error = EngineError("its logits hold a NaN", code="bad_logits", phase="decode.stream", retryable=False)
            if len(finished) == 3:
                return StepOutput(
                    tokens=output.tokens, routed_RE=output.routed_RE, started_s=output.started_s, ended_s=output.ended_s, errors={0: error}
                )
        return output

    monkeypatch.setattr(LateWorker, "run", poisoned)

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            sampling, longer = with_max(GREEDY, 40), with_max(GREEDY, 200)  # so that the good one joins the bad one
            bad, good = Prompt("bad", 0, ids(9), longer), Prompt("good", 0, ids(12, 2), sampling)
            for prompt in (bad, good):
                rig.gateway.start(prompt, rig.prefill)
                await rig.prefill.prefill(prompt)
            failure = await rig.gateway.failed("bad")
            assert (failure.code, failure.phase, failure.retryable) == ("bad_logits", "decode.stream", False)
            await rig.gateway.finished("good")
            assert rig.gateway.answers["good"].ids() == expected(good.prompt_ids, sampling)[1:]
            got = rig.gateway.answers["bad"].ids()
            assert got == expected(bad.prompt_ids, with_max(GREEDY, len(got) + 1))[1:], "a wrong token was emitted"
            await rig.at_rest()

    asyncio.run(go())


def test_what_the_worker_cannot_sample_is_refused_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(self: LateWorker, sampling: Sampling) -> None:
        if sampling.min_tokens:
            raise RequestError("33 ending ids: at most 32 can be masked", param="stop_token_ids")

    monkeypatch.setattr(LateWorker, "check", check)

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            rig.gateway.start(Prompt("r", 0, ids(9), Sampling(max_tokens=9, min_tokens=3)), rig.prefill)
            failure = await rig.gateway.failed("r")
            assert (failure.code, failure.retryable) == ("invalid_value", False)
            assert await serve(rig, Prompt("ok", 0, ids(20), GREEDY)) == expected(ids(20))
            await rig.at_rest()

    asyncio.run(go())


def test_no_step_is_launched_ahead_while_kv_lands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its KV lands no step is launched ahead: the step that it joins is launched when nothing is under way."""
    log: list[tuple[str, int]] = []
    joining = threading.Event()
    run, finish, pack = LateWorker.run, LateWorker.finish, PrefillWorker.pack

    def slow_pack(self: PrefillWorker, handle_id: int, span: MessageSpan, blocks: Sequence[int], out: memoryview) -> None:
        """What follows a leg's first message comes five steps later."""
        while joining.is_set() and span.message_idx > 0 and log.count(("finish", 0)) < 5:
            time.sleep(0.001)
        pack(self, handle_id, span, blocks, out)

    def logged_run(self: LateWorker, step: StepInput) -> StepOutput | None:
        log.append(("run", len(step.rows)))
        time.sleep(0.02)
        return run(self, step)

    def logged_finish(self: LateWorker) -> StepOutput:
        log.append(("finish", 0))
        return finish(self)

    monkeypatch.setattr(LateWorker, "run", logged_run)
    monkeypatch.setattr(LateWorker, "finish", logged_finish)
    monkeypatch.setattr(PrefillWorker, "pack", slow_pack)
    monkeypatch.setattr("services.decode.handoff.JOIN_WITHIN_S", 60.0)  # however slow this machine is
    config = configuration(tmp_path, {"model": {"units": 4}})

    def makers() -> WorkerMakers:
        def decode(config: DuomoConfig) -> StepWorker:
            return LateWorker(model(), KvCache(kv_spec(model().config, 16), config.decode.num_blocks), torch_threads=1)

        return WorkerMakers(prefill=lambda config: PrefillWorker(model(), WorkerSizes.of(config), config.delays), decode=decode)

    async def go() -> None:
        async with system(config, 1, 1, makers=makers()) as made:
            long = with_max(GREEDY, 400)
            made.start("long", ids(5), long, p=0, d=0)
            await until(lambda: log.count(("run", 1)) > 3)
            joining.set()
            made.start("joins", ids(40, 7), with_max(GREEDY, 6), p=0, d=0)
            await made.ended("joins", p=0, d=0)
            assert made.tokens("joins", p=0, d=0) == expected(ids(40, 7), with_max(GREEDY, 6))
            made.decodes[0][1].cancel("long")
            made.prefills[0][1].cancel("long")
            await made.at_rest()

    asyncio.run(go())
    first, joined = log.index(("finish", 0)), log.index(("run", 2))
    assert log[:first].count(("run", 1)) > 3, "ahead as long as nothing lands"
    assert log[first:joined].count(("finish", 0)) > 3, "one for each step while it lands"
    pairs = list(itertools.pairwise(log[first:joined]))
    assert (("run", 1), ("run", 1)) not in pairs, "none is launched behind another, but that which the leg joins"


def test_what_lands_while_a_step_runs_is_taken_in_before_the_step_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step under way is not over before all of another leg's messages are verified: queued behind it, they are in their blocks."""
    num_looks, may_end = [0], threading.Event()

    def is_over(_: LateWorker) -> bool:
        num_looks[0] += 1
        return may_end.is_set()

    monkeypatch.setattr(LateWorker, "is_over", is_over)
    monkeypatch.setattr("services.decode.handoff.JOIN_WITHIN_S", 60.0)  # however slow this machine is

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:

            def num_landed() -> int:
                return rig.agent.counts().counters.get("messages_landed", 0)

            may_end.set()
            long = Prompt("long", 0, ids(5), with_max(GREEDY, 400))
            rig.gateway.start(long, rig.prefill)
            await rig.prefill.prefill(long)
            await until(lambda: len(rig.gateway.answers["long"].ids()) > 3)
            joins = Prompt("joins", 0, ids(40, 7), with_max(GREEDY, 6))
            rig.gateway.start(joins, rig.prefill)
            rig.prefill.announce(joins)
            handle = await rig.prefill.granted(joins)
            computed = rig.prefill.compute(joins)
            first, *others = rig.prefill.open(handle, computed)
            num_before, num_looks[0] = num_landed(), 0
            may_end.clear()
            rig.prefill.push(handle.handle_id, first.message_idx)
            await until(lambda: num_looks[0] > 0)  # the step thread looks from here on, and nobody else
            for span in others:
                rig.prefill.push(handle.handle_id, span.message_idx)
            await until(lambda: num_landed() == num_before + 1 + len(others))
            assert len(others) > 1 and not may_end.is_set()
            may_end.set()
            rig.prefill.done(joins, handle, computed)
            await rig.gateway.finished("joins")
            assert [computed.first_token_ids[0], *rig.gateway.answers["joins"].ids()] == expected(joins.prompt_ids, joins.sampling)
            rig.gateway.cancel("long")
            await rig.at_rest()

    asyncio.run(go())


def test_a_leg_that_can_begin_is_planned_before_the_step_thread_has_ended_its_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last message may be there before prefill says that it is done: the loop does not wait for the thread's word that nothing came."""
    holds, is_held, released, planned = threading.Event(), threading.Event(), threading.Event(), list[bool]()
    watch, join = StepLoop._watch, Batch.join

    def held_watch(self: StepLoop, foreseen: StepInput | None) -> tuple[LandedMessage, ...]:
        landed = watch(self, foreseen)
        if holds.is_set():
            is_held.set()
            assert released.wait(30)
        return landed

    def seen_join(self: Batch, leg: Leg) -> None:
        planned.append(is_held.is_set() and not released.is_set())
        join(self, leg)

    monkeypatch.setattr(StepLoop, "_watch", held_watch)
    monkeypatch.setattr(Batch, "join", seen_join)
    monkeypatch.setattr("services.decode.handoff.JOIN_WITHIN_S", 60.0)  # however slow this machine is

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            one = Prompt("one", 0, ids(40, 7), with_max(GREEDY, 6))
            rig.gateway.start(one, rig.prefill)
            handle, computed = await rig.prefill.send(one)
            await until(lambda: len(rig.prefill.of(GroupLanded, "one")) == len(rig.prefill.spans[handle.handle_id]))
            holds.set()
            await until(is_held.is_set)
            rig.prefill.done(one, handle, computed)
            try:
                await until(lambda: bool(planned))
            finally:
                holds.clear()
                released.set()
            await rig.gateway.finished("one")
            assert planned == [True]
            assert [computed.first_token_ids[0], *rig.gateway.answers["one"].ids()] == expected(one.prompt_ids, one.sampling)
            await rig.at_rest()

    asyncio.run(go())
