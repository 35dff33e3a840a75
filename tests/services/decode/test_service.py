"""The decode service with a scripted producer and gateway: tokens, choices, endings, preemption, drain, spans."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duomo.telemetry.span_file import read_spans
from duomo.wire.messages import Cancel, Drain, Preempted, Refused, RequestFinished
from duomo.wire.values import EmittedToken, Sampling
from services.decode.worker import StepInput, StepOutput
from tests.services.decode.rig import configuration, running, serve
from tests.services.decode.scripted_peers import GREEDY, Prompt, expected, ids, resumed, until, with_max


def play(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_tokens_equal_the_monolith(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompts = [Prompt(f"r{size}", 0, ids(size, size), GREEDY) for size in (1, 15, 16, 17, 63, 257)]
            for prompt in prompts:
                assert await serve(rig, prompt) == expected(prompt.prompt_ids)
                answer = rig.gateway.answers[prompt.request_id]
                assert sorted(answer.tokens[0]) == list(range(1, GREEDY.max_tokens))
                assert answer.finish == {0: "length"}
                timings = answer.tokens[0][1].timings
                assert timings is not None and 0 <= timings.admit_s < timings.total_s and 0 < timings.first_step_s < timings.total_s
                assert all(token.timings is None for index, token in answer.tokens[0].items() if index > 1)
            await rig.at_rest()
            num_computed = sum(len(prompt.prompt_ids) + GREEDY.max_tokens - 1 for prompt in prompts)
            routed = rig.service.prompt_experts.total_LE.sum() + rig.service.decoded_experts.total_LE.sum()
            assert routed == rig.service.counters["expert_tokens"] == num_computed * 8 * 4  # layers, experts a token
            assert rig.service.prompt_experts.total_LE.sum() == sum(len(prompt.prompt_ids) for prompt in prompts) * 8 * 4

    play(go())


def test_a_report_tells_what_is_promised_and_how_long_steps_take(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            first = rig.service.report()
            assert (first.num_promised_blocks, first.step_s) == (0, 0.0)
            prompt = Prompt("r", 0, ids(40), with_max(GREEDY, 24))
            rig.gateway.start(prompt, rig.prefill)
            await until(lambda: rig.service.report().num_queued == 1)
            assert rig.service.report().num_promised_blocks == 4, "64 tokens that it waits for"
            rig.prefill.announce(prompt)
            await rig.prefill.granted(prompt)
            report = rig.service.report()
            assert report.num_promised_blocks == 1 and report.num_free_blocks == 96 - 3, "the prompt's are taken"
            rig.gateway.cancel("r")
            await until(lambda: rig.service.num_live_requests() == 0)
            assert rig.service.report().num_promised_blocks == 0
            began_s = time.monotonic()
            await serve(rig, Prompt("s", 0, ids(20), with_max(GREEDY, 30)))
            last = rig.service.report()
            assert last.num_promised_blocks == 0 and 0 < last.step_s < time.monotonic() - began_s
            assert last.max_choices is None, "no limit is set"

    play(go())


@pytest.mark.parametrize(("max_itl_s", "kept"), [(1e-6, 1), (60.0, 2)])
def test_a_report_tells_how_many_keep_the_limit_between_tokens(tmp_path: Path, max_itl_s: float, kept: int) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path, {"decode": {"max_itl_s": max_itl_s}})) as rig:
            assert rig.service.report().max_choices == 1, "nothing is known"
            await serve(rig, Prompt("s", 0, ids(20), with_max(GREEDY, 60)))
            assert rig.service.report().max_choices == kept

    play(go())


def test_one_frame_a_step_serves_all_streams(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            sampling = with_max(GREEDY, 24)
            prompts = [Prompt(f"r{number}", 0, ids(5 + number, number), sampling) for number in range(6)]
            for prompt in prompts:
                rig.gateway.start(prompt, rig.prefill)
            await asyncio.gather(*(rig.prefill.prefill(prompt) for prompt in prompts))
            for prompt in prompts:
                await rig.gateway.finished(prompt.request_id)
            assert rig.gateway.frames == rig.service.progress.num_steps
            assert rig.gateway.frames < 6 * 23
            for prompt in prompts:
                assert rig.gateway.answers[prompt.request_id].ids() == expected(prompt.prompt_ids, sampling)[1:]
            await rig.at_rest()

    play(go())


def test_three_choices_fork_one_prompt(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            sampling = Sampling(max_tokens=20, temperature=0.9, seed=11, ignore_eos=True, logprobs=2)
            for size in (21, 32):  # a partial last block, and none
                prompt = Prompt(f"n{size}", 0, ids(size), sampling, choices=(0, 1, 2))
                await serve(rig, prompt)
                answer = rig.gateway.answers[prompt.request_id]
                for choice in prompt.choices:
                    assert answer.ids(choice) == expected(prompt.prompt_ids, sampling, choice)[1:]
                    logprob = answer.tokens[choice][1].logprob
                    assert logprob is not None and len(logprob.top) == 2
                assert len(rig.gateway.of(RequestFinished, prompt.request_id)) == 1
            await rig.at_rest()

    play(go())


def test_eos_and_stop_ids_end_a_choice(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            tokens = expected(ids(9))
            sampling = with_max(GREEDY, 12, stop_token_ids=(tokens[4],))
            first = tokens.index(tokens[4])
            assert first > 0, "choose another prompt: its first token is the stop token"
            assert await serve(rig, Prompt("s", 0, ids(9), sampling)) == tokens[: first + 1]
            assert rig.gateway.answers["s"].finish == {0: "stop"}
            await rig.at_rest()

    play(go())


def test_choices_that_ended_on_prefill_are_not_decoded(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            for ended in ((0, 1), (0,)):
                prompt = Prompt(f"e{len(ended)}", 0, ids(20), GREEDY, choices=(0, 1))
                rig.gateway.start(prompt, rig.prefill)
                handle, computed = await rig.prefill.send(prompt)
                rig.prefill.done(prompt, handle, computed, ended)
                await rig.gateway.finished(prompt.request_id)
                answer = rig.gateway.answers[prompt.request_id]
                assert answer.ids(0) == []
                assert answer.ids(1) == ([] if len(ended) == 2 else expected(prompt.prompt_ids, GREEDY, 1)[1:])
            await rig.at_rest()

    play(go())


def test_the_death_of_a_gateway_ends_its_requests_within_a_second(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompts = [Prompt(f"r{number}", 0, ids(20, number), with_max(GREEDY, 2000)) for number in range(3)]
            waiting = Prompt("waiting", 0, ids(20), GREEDY)
            rig.gateway.start(prompts[0], rig.prefill)
            await rig.prefill.prefill(prompts[0])
            rig.gateway.start(waiting, rig.prefill)
            rig.prefill.announce(waiting)
            await rig.prefill.granted(waiting)
            await rig.gateway.close()
            await until(lambda: rig.service.num_live_requests() == 0, 1.0)
            assert (await rig.prefill.one(Cancel, "waiting")).reason == "gateway_gone"
            await rig.at_rest()

    play(go())


def test_cancel_returns_everything_at_every_stage(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            sampling = with_max(GREEDY, 2000)
            expected_only = Prompt("expected", 0, ids(33), sampling)
            rig.gateway.start(expected_only, rig.prefill)
            granted = Prompt("granted", 0, ids(34), sampling)
            rig.gateway.start(granted, rig.prefill)
            rig.prefill.announce(granted)
            handle = await rig.prefill.granted(granted)
            rig.prefill.open(handle, rig.prefill.compute(granted))
            rig.prefill.push(handle.handle_id, 0)
            streaming = Prompt("streaming", 0, ids(35), sampling)
            rig.gateway.start(streaming, rig.prefill)
            await rig.prefill.prefill(streaming)
            await until(lambda: len(rig.gateway.answers["streaming"].tokens[0]) > 3)
            for prompt in (expected_only, granted, streaming):
                rig.gateway.cancel(prompt.request_id)
            await until(lambda: rig.service.num_live_requests() == 0, 1.0)
            await rig.at_rest()
            late = Prompt("granted", 0, ids(34), sampling)
            rig.prefill.announce(late)  # void by now: the producer is told
            await until(lambda: len(rig.prefill.of(Cancel, "granted")) == 2)

    play(go())


def test_one_choice_can_be_cancelled(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            sampling = with_max(GREEDY, 60)
            prompt = Prompt("c", 0, ids(21), sampling, choices=(0, 1))
            rig.gateway.start(prompt, rig.prefill)
            await rig.prefill.prefill(prompt)
            await until(lambda: len(rig.gateway.answers["c"].tokens[0]) > 3)
            rig.gateway.cancel("c", choice=0)
            await rig.gateway.finished("c")
            answer = rig.gateway.answers["c"]
            assert answer.ids(1) == expected(prompt.prompt_ids, sampling, 1)[1:]
            assert len(answer.ids(0)) < 59
            await rig.at_rest()

    play(go())


def test_deadlines_end_requests(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            rig.gateway.start(Prompt("d", 0, ids(5), GREEDY), rig.prefill, remaining_s=0.1)
            failure = await rig.gateway.failed("d")
            assert (failure.code, failure.retryable) == ("deadline_exceeded", False)
            await rig.at_rest()

    play(go())


def test_preempted_choices_resume_with_equal_tokens(tmp_path: Path) -> None:
    async def go() -> None:
        changes: dict[str, dict[str, object]] = {"decode": {"num_blocks": 12, "watermark_blocks": 0, "admit_ahead_tokens": 4}}
        async with running(configuration(tmp_path, changes)) as rig:
            sampling = with_max(GREEDY, 60)
            prompts = {f"p{number}": Prompt(f"p{number}", 0, ids(30, number), sampling) for number in range(4)}
            tasks: list[asyncio.Task[object]] = []

            def resume(message: Preempted) -> None:
                prompt = prompts[message.request_id]
                answer = rig.gateway.answers[message.request_id]
                emitted = [firsts[message.request_id], *answer.ids()]
                assert message.num_emitted == len(emitted)
                prompts[message.request_id] = prompt = resumed(prompt, emitted)
                tasks.append(asyncio.create_task(carry_on(prompt)))

            async def carry_on(prompt: Prompt) -> None:
                rig.gateway.start(prompt, rig.prefill)
                computed = await rig.prefill.prefill(prompt)
                answer = rig.gateway.answers[prompt.request_id]
                answer.tokens[0].setdefault(len(prompt.emitted_ids), first_of(prompt, computed.first_token_ids[0]))

            rig.gateway.on_preempted = resume
            firsts = {request_id: expected(prompt.prompt_ids, sampling)[0] for request_id, prompt in prompts.items()}
            for prompt in prompts.values():
                rig.gateway.start(prompt, rig.prefill)
            await asyncio.gather(*(rig.prefill.prefill(prompt) for prompt in prompts.values()))
            for request_id in prompts:
                await rig.gateway.finished(request_id)
                assert [firsts[request_id], *rig.gateway.answers[request_id].ids()] == expected(ids(30, int(request_id[1])), sampling)
            assert tasks, "nothing was preempted: the test shows nothing"
            await asyncio.gather(*tasks)
            assert max(prompt.attempt for prompt in prompts.values()) <= rig.config.decode.max_preemptions
            await rig.at_rest()

    play(go())


def first_of(prompt: Prompt, token_id: int) -> Any:
    return EmittedToken(request_id=prompt.request_id, choice=0, attempt=prompt.attempt, index=len(prompt.emitted_ids), token_id=token_id)


def test_wrong_messages_are_refused_and_the_connection_lives(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt = Prompt("w", 0, ids(20), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.gateway.start(prompt, rig.prefill)
            refused = await rig.gateway.one(Refused)
            assert refused.code == "started_twice"
            rig.prefill.announce(replace(prompt, prompt_ids=ids(21)))
            failure = await rig.gateway.failed("w")
            assert failure.code == "kv_mismatch"
            bad = Prompt("v", 0, (8192 * 4,), GREEDY)
            rig.gateway.start(bad, rig.prefill)
            assert (await rig.gateway.failed("v")).code == "bad_field"
            assert await serve(rig, Prompt("ok", 0, ids(20), GREEDY)) == expected(ids(20))
            await rig.at_rest()

    play(go())


def test_drain_finishes_streams_and_takes_no_new(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt, gate, run = Prompt("d", 0, ids(20), with_max(GREEDY, 80)), threading.Event(), rig.worker.run

            def held(step: StepInput) -> StepOutput | None:
                assert gate.wait(60), "nobody opened it"
                return run(step)

            rig.worker.run = held  # type: ignore[method-assign,assignment]  # the stream lives until the new one was refused
            rig.gateway.start(prompt, rig.prefill)
            await rig.prefill.prefill(prompt)
            serving = asyncio.create_task(rig.service.membership.serve(asyncio.Event()))
            rig.gateway.post(Drain(deadline_s=100.0))
            await until(lambda: rig.gateway.report is not None and rig.gateway.report.is_draining)
            rig.gateway.start(Prompt("new", 0, ids(5), GREEDY), rig.prefill)
            failure = await rig.gateway.failed("new")
            assert (failure.code, failure.retryable) == ("draining", True)
            gate.set()
            await serving
            assert rig.gateway.answers["d"].ids() == expected(prompt.prompt_ids, prompt.sampling)[1:]
            await rig.at_rest()

    play(go())


def test_spans_tell_the_leg(tmp_path: Path) -> None:
    async def go() -> None:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with running(configuration(tmp_path, {"tracing": {"directory": str(tmp_path / "spans")}})) as rig:
            prompt = Prompt("s", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill, traceparent=parent)
            await rig.prefill.prefill(prompt)
            await rig.gateway.finished("s")
            await rig.at_rest()
        lines = [json.loads(line) for file in (tmp_path / "spans").iterdir() for line in file.read_text().splitlines()]
        spans = {line["name"]: line for line in lines if "name" in line}
        assert {"kv.handoff", "decode.admit", "decode.first_step", "decode.stream"} <= set(spans)
        assert "0af7651916cd43dd8448eb211c80319c" in json.dumps(spans["kv.handoff"])

    play(go())


def test_a_broken_step_answers_every_request(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt = Prompt("b", 0, ids(20), with_max(GREEDY, 1000))
            rig.gateway.start(prompt, rig.prefill)
            await rig.prefill.prefill(prompt)
            rig.worker.runner.cache = None  # type: ignore[assignment]  # a step that raises
            failure = await rig.gateway.failed("b")
            assert (failure.code, failure.retryable) == ("engine_failed", True)
            with pytest.raises(Exception, match="decode step failed"):
                rig.service.check_health()
            assert rig.service.pool.num_free_blocks == rig.service.pool.limits.num_blocks

    play(go())


def test_a_handoff_that_arrived_is_told_though_its_leg_is_cancelled_before_it_joins(tmp_path: Path) -> None:
    async def go() -> None:
        changes: dict[str, dict[str, object]] = {"tracing": {"directory": str(tmp_path / "spans")}, "delays": {"decode_admit_s": 60.0}}
        async with running(configuration(tmp_path, changes)) as rig:
            prompt = Prompt("here", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            await rig.prefill.prefill(prompt)
            await until(lambda: bool(rig.service._ready))
            rig.gateway.cancel("here")
            await rig.at_rest()
            counters = rig.service.report().counters
            assert (counters.get("handoffs"), counters.get("handoffs_given_up"), counters["cancelled"]) == (1, None, 1)
            assert counters["handoff_bytes.sum"] == counters["landed_bytes"] > 0

    play(go())
    (told,) = [span for span in read_spans(tmp_path / "spans") if span.name == "kv.handoff"]
    assert told.attributes["duomo.landed"] == told.attributes["duomo.messages"] and "duomo.given_up" not in told.attributes
