"""Decode's prefix cache seen from its peers: which blocks a handle asks for after turns that ended, failed, were cancelled or gave way."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from duomo.errors import EngineError
from duomo.wire.messages import Cancel, Preempted, RequestFailed, RequestFinished
from duomo.wire.values import Sampling
from services.decode.worker import DecodeWorker, StepInput, StepOutput
from services.kv_transfer.faults import Fault, FaultPlan, ScriptedFaults
from tests.services.decode.rig import Rig, configuration, running, serve
from tests.services.decode.scripted_peers import GREEDY, Prompt, expected, ids, resumed, until, with_max

PROMPT = ids(70)  # 4 full blocks


def play(folder: Path, scenario: Callable[[Rig], Coroutine[Any, Any, None]], faults: FaultPlan | None = None, **decode: object) -> None:
    async def go() -> None:
        async with running(configuration(folder, {"decode": decode}), faults) as rig:
            await scenario(rig)
            await rig.at_rest()

    asyncio.run(go())


async def first_block(rig: Rig, name: str, prompt_ids: tuple[int, ...], sampling: Sampling = GREEDY) -> int:
    """Serve the prompt, rightly; the first block that was sent for it."""
    prompt = Prompt(name, 0, prompt_ids, sampling)
    assert await serve(rig, prompt) == expected(prompt_ids, sampling)
    return rig.prefill.handles[name, 0].first_block


def test_what_ended_is_not_sent_again_up_to_the_last_token_that_was_fed(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        answered = (*PROMPT, *expected(PROMPT, with_max(GREEDY, 26)))  # 96 tokens, 95 of them fed
        assert await first_block(rig, "turn 1", PROMPT, with_max(GREEDY, 26)) == 0
        assert await first_block(rig, "turn 2", (*answered, 5)) == 5
        assert await first_block(rig, "turn 2 again", (*answered, 5)) == 6, "landed by now"
        assert await first_block(rig, "whole blocks", PROMPT[:64]) == 3, "the last one is sent again"
        assert await first_block(rig, "shorter", PROMPT[:15]) == 0
        assert rig.service.report().prefix_digests

    play(tmp_path, scenario)


def test_without_a_cache_everything_is_sent_and_nothing_is_told(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        for number in range(2):
            assert await first_block(rig, f"turn {number}", PROMPT) == 0
        report = rig.service.report()
        assert (report.prefix_digests, report.num_cached_blocks, report.num_free_blocks) == ((), 0, 96)

    play(tmp_path, scenario, prefix_cache_blocks=0)


def test_an_answer_of_every_choice_is_known(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        sampling = Sampling(max_tokens=30, temperature=0.9, seed=3, ignore_eos=True)
        rig.gateway.start(prompt := Prompt("n", 0, PROMPT, sampling, choices=(0, 1, 2)), rig.prefill)
        await rig.prefill.prefill(prompt)
        await rig.gateway.finished("n")
        answers = [expected(PROMPT, sampling, choice) for choice in range(3)]
        assert len({tuple(answer) for answer in answers}) == 3
        for choice, answer in enumerate(answers):
            assert await first_block(rig, f"after {choice}", (*PROMPT, *answer)) == 6

    play(tmp_path, scenario)


def test_a_landing_that_is_corrupt_twice_is_never_known(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.gateway.start(prompt := Prompt("bad", 0, PROMPT, GREEDY), rig.prefill)
        serving = asyncio.create_task(rig.prefill.prefill(prompt))
        assert (await rig.gateway.failed("bad")).code == "kv_corrupt"
        await serving
        assert (rig.service.report().num_cached_blocks, rig.service.report().prefix_digests) == (0, ())
        rig.hub.faults = ScriptedFaults()
        assert await first_block(rig, "good", PROMPT) == 0

    play(tmp_path, scenario, ScriptedFaults({write: Fault(corrupt_byte=9) for write in range(40)}))


def test_one_that_is_pulled_once_is_known_with_the_right_bytes(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        assert await first_block(rig, "pulled", PROMPT) == 0
        assert rig.service.report().counters["kv_mismatches"] == 1
        assert await first_block(rig, "after", (*PROMPT, 9)) == 4

    play(tmp_path, scenario, ScriptedFaults({1: Fault(corrupt_byte=77)}))


def test_a_prompt_is_known_once_all_of_it_has_landed_before_prefill_says_that_it_is_done(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.gateway.start(prompt := Prompt("r", 0, PROMPT, GREEDY), rig.prefill)
        handle, computed = await rig.prefill.send(prompt)
        await until(lambda: bool(rig.service.report().prefix_digests))
        assert await first_block(rig, "after", (*PROMPT, 9)) == 4
        rig.prefill.done(prompt, handle, computed)
        await rig.gateway.finished("r")
        assert rig.gateway.answers["r"].ids() == expected(PROMPT)[1:]

    play(tmp_path, scenario)


@pytest.mark.parametrize("ends", ["cancelled", "taken back"])
def test_a_handle_that_is_withdrawn_while_it_lands_leaves_only_what_was_known(tmp_path: Path, ends: str) -> None:
    async def scenario(rig: Rig) -> None:
        await first_block(rig, "turn 1", PROMPT[:40])
        rig.gateway.start(prompt := Prompt("r", 0, PROMPT, GREEDY), rig.prefill)
        rig.prefill.announce(prompt)
        handle = await rig.prefill.granted(prompt)
        assert handle.first_block == 2
        computed = rig.prefill.compute(prompt)
        rig.prefill.open(handle, computed)
        rig.prefill.push(handle.handle_id, 0)
        await until(lambda: rig.service.pool.manager.num_held == 5)
        if ends == "cancelled":
            rig.gateway.cancel("r")
        else:
            rig.prefill.post(Cancel(request_id="r", attempt=0, traceparent="", remaining_s=0.0, reason="no_grant"))
            await rig.prefill.fence(handle)
        await until(lambda: rig.service.pool.manager.num_held == 0)
        rig.service.pool.check_integrity()
        if ends == "taken back":
            del rig.prefill.handles["r", 0]
            await rig.prefill.prefill(prompt)
            await rig.gateway.finished("r")
            assert rig.gateway.answers["r"].ids() == expected(PROMPT)[1:]
            assert rig.prefill.handles["r", 0].first_block == 2
        else:
            assert await first_block(rig, "again", PROMPT) == 2

    play(tmp_path, scenario)


def test_a_row_without_a_token_takes_what_it_read_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prompt's blocks too, though others read them: whoever comes next computes them anew."""
    run, is_poisoned = DecodeWorker.run, False

    def poisoned(self: DecodeWorker, step: StepInput) -> StepOutput:
        output = run(self, step)
        error = EngineError("its logits hold a NaN", code="bad_logits", phase="decode.stream", retryable=False)
        return dataclasses.replace(output, errors={0: error}) if is_poisoned and step.rows else output

    monkeypatch.setattr(DecodeWorker, "run", poisoned)

    async def scenario(rig: Rig) -> None:
        nonlocal is_poisoned
        await first_block(rig, "turn 1", PROMPT, with_max(GREEDY, 8))
        rig.gateway.start(prompt := Prompt("bad", 0, (*PROMPT, 3), with_max(GREEDY, 400)), rig.prefill)
        await rig.prefill.prefill(prompt)
        assert rig.prefill.handles["bad", 0].first_block == 4
        await until(lambda: len(rig.gateway.answers["bad"].ids()) > 20)
        is_poisoned = True
        assert (await rig.gateway.failed("bad")).code == "bad_logits"
        is_poisoned = False
        assert (rig.service.report().num_cached_blocks, rig.service.report().prefix_digests) == (0, ())
        assert await first_block(rig, "again", PROMPT) == 0

    play(tmp_path, scenario)


def test_a_resume_lands_only_what_was_evicted_meanwhile(tmp_path: Path) -> None:
    """14 blocks for three legs that outgrow their promise: whoever gives way comes again, and its tokens go on as they were."""

    async def scenario(rig: Rig) -> None:
        sampling, first_blocks = with_max(GREEDY, 60), []
        prompts = {f"p{number}": Prompt(f"p{number}", 0, ids(30, number), sampling) for number in range(3)}
        tasks: list[asyncio.Task[None]] = []

        async def attempt(prompt: Prompt) -> None:
            rig.gateway.start(prompt, rig.prefill)
            computed = await rig.prefill.prefill(prompt)
            emitted[prompt.request_id, len(prompt.emitted_ids)] = computed.first_token_ids[0]
            first_blocks.append((prompt.attempt, rig.prefill.handles[prompt.request_id, prompt.attempt].first_block))

        def tokens(name: str) -> list[int]:
            seen = {index: token.token_id for index, token in rig.gateway.answers[name].tokens[0].items()}
            seen |= {index: token_id for (request_id, index), token_id in emitted.items() if request_id == name}
            return [seen[index] for index in sorted(seen)]

        def resume(message: Preempted) -> None:
            prompts[message.request_id] = again = resumed(prompts[message.request_id], tokens(message.request_id)[: message.num_emitted])
            tasks.append(asyncio.create_task(attempt(again)))

        emitted: dict[tuple[str, int], int] = {}
        rig.gateway.on_preempted = resume
        await asyncio.gather(*(attempt(prompt) for prompt in prompts.values()))
        for name in prompts:
            await until(lambda name=name: bool(rig.gateway.of(RequestFinished, name) or rig.gateway.of(RequestFailed, name)))  # type: ignore[misc]  # a default binds the name
            assert tokens(name) == expected(ids(30, int(name[1])), sampling), name
        await asyncio.gather(*tasks)
        assert tasks and any(number > 0 and first_block > 0 for number, first_block in first_blocks), first_blocks

    play(tmp_path, scenario, num_blocks=14, watermark_blocks=0, admit_ahead_tokens=4)
