"""The handoff seen from decode: grants, faults, deaths, timeouts. Real sockets, real agents over loopback, the real model."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from duomo.engine.decode_step import Joining
from duomo.wire.histogram import packed
from duomo.wire.messages import Cancel, HandleOffered, Preempted, PullKv, Refused, RequestFailed, RequestFinished
from services.decode import handoff, steps
from services.decode.worker import DecodeWorker, StepInput
from services.kv_transfer.faults import Fault, FaultPlan, ScriptedFaults, SeededFaults
from tests.services.decode.rig import configuration, running
from tests.services.decode.scripted_peers import GREEDY, WAIT_S, Prompt, expected, ids, until, with_max


def play(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


LOST = ScriptedFaults({1: Fault(drops_data=True)})


def test_an_announcement_may_come_before_its_request(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt = Prompt("early", 0, ids(30), GREEDY)
            serving = asyncio.create_task(rig.prefill.prefill(prompt))
            await until(lambda: ("early", 0) in rig.service._handoffs._early)
            assert not rig.prefill.of(HandleOffered)
            rig.gateway.start(prompt, rig.prefill)
            await serving
            await rig.gateway.finished("early")
            assert rig.gateway.answers["early"].ids() == expected(prompt.prompt_ids)[1:]
            await rig.at_rest()

    play(go())


def test_a_look_for_messages_ends_when_prefill_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leg whose messages have landed waits for PrefillDone alone, which comes while the step thread looks for more."""
    monkeypatch.setattr(steps, "LONGEST_WATCH_S", 3 * WAIT_S)
    monkeypatch.setattr(handoff, "JOIN_WITHIN_S", 3 * WAIT_S)

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            rig.gateway.start(prompt := Prompt("r", 0, ids(40), GREEDY), rig.prefill)
            offered, computed = await rig.prefill.send(prompt)
            await until(lambda: bool(rig.service.report().prefix_digests))
            rig.prefill.done(prompt, offered, computed)
            await rig.gateway.finished("r")
            assert rig.gateway.answers["r"].ids() == expected(ids(40))[1:]

    play(go())


def test_while_a_prompt_lands_alone_its_first_step_is_rehearsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed: list[StepInput] = []
    monkeypatch.setattr(DecodeWorker, "rehearse", lambda _, step: rehearsed.append(step))

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            rig.gateway.start(prompt := Prompt("r", 0, ids(64), GREEDY), rig.prefill)
            rig.prefill.announce(prompt)
            handle, computed = await rig.prefill.granted(prompt), rig.prefill.compute(prompt)
            first, *others = rig.prefill.open(handle, computed)
            assert others and not rehearsed
            rig.prefill.push(handle.handle_id, first.message_idx)
            await until(lambda: bool(rehearsed))
            (row,) = rehearsed[0].rows
            assert isinstance(row.source, Joining) and row.source.sampling.prompt_ids == ids(64)
            assert row.position == 64 and len(row.table) == 5, "its token lies in a block that it has not taken"
            for span in others:
                rig.prefill.push(handle.handle_id, span.message_idx)
            rig.prefill.done(prompt, handle, computed)
            await rig.gateway.finished("r")
            assert rig.gateway.answers["r"].ids() == expected(ids(64))[1:]
            rehearsed.clear()
            rig.gateway.start(counted := Prompt("p", 0, ids(64, 2), msgspec.structs.replace(GREEDY, presence_penalty=0.5)), rig.prefill)
            await rig.prefill.prefill(counted)
            await rig.gateway.finished("p")
            assert not rehearsed, "its tables would be filled each time"

    play(go())


@pytest.mark.parametrize(
    ("faults", "num_pulled"),
    [
        (ScriptedFaults({1: Fault(corrupt_byte=77)}), 1),
        (ScriptedFaults({2: Fault(truncate_bytes=4096)}), 1),
        (ScriptedFaults({0: Fault(duplicate_after_s=0.02), 3: Fault(duplicate_after_s=0.0)}), 0),
        (ScriptedFaults({0: Fault(delay_s=0.15), 1: Fault(delay_s=0.05), 2: Fault(announces_early=True, delay_s=0.03)}), 0),
        (ScriptedFaults({1: Fault(drops_notification=True)}), 0),
        (LOST, 1),
        (SeededFaults(seed=5, max_delay_s=0.02, chance_duplicate=0.3, chance_corrupt=0.1, chance_announce_early=0.3), None),
    ],
    ids=["corrupt", "truncated", "duplicate", "reordered", "silent", "dropped", "seeded"],
)
def test_faulty_messages_never_give_wrong_tokens(tmp_path: Path, faults: FaultPlan, num_pulled: int | None) -> None:
    write_timeout_s = 3.0 if faults == LOST else 60.0  # only what is lost has to be missed, in a part of it

    async def go() -> None:
        async with running(configuration(tmp_path, {"kv_transfer": {"write_timeout_s": write_timeout_s}}), faults) as rig:
            prompt = Prompt("f", 0, ids(70), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            serving = asyncio.create_task(rig.prefill.prefill(prompt))
            await until(lambda: bool(rig.gateway.of(RequestFinished) or rig.gateway.of(RequestFailed)))
            await serving
            if num_pulled is not None:
                assert not rig.gateway.of(RequestFailed)
                assert len(rig.prefill.of(PullKv)) == num_pulled
            if rig.gateway.of(RequestFinished):
                assert rig.gateway.answers["f"].ids() == expected(prompt.prompt_ids)[1:]
            else:
                assert rig.gateway.of(RequestFailed)[0].code == "kv_corrupt"
            await rig.at_rest()

    play(go())


def test_twice_corrupt_is_a_typed_failure(tmp_path: Path) -> None:
    async def go() -> None:
        faults = ScriptedFaults({write: Fault(corrupt_byte=9) for write in range(40)})
        async with running(configuration(tmp_path), faults) as rig:
            prompt = Prompt("c", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            serving = asyncio.create_task(rig.prefill.prefill(prompt))
            failure = await rig.gateway.failed("c")
            assert (failure.code, failure.phase, failure.retryable) == ("kv_corrupt", "kv.handoff", True)
            await serving
            assert rig.prefill.of(RequestFailed, "c")
            assert rig.gateway.answers["c"].ids() == []
            await rig.at_rest()

    play(go())


def test_a_second_write_that_spoils_a_message_between_its_proof_and_its_copy_is_no_wrong_answer(tmp_path: Path) -> None:
    """The first write was only late. Had the copy been believed, the request would have been answered from spoilt KV."""

    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            scatter, prompt = rig.worker.cache.scatter, Prompt("w", 0, ids(40), GREEDY)

            def spoilt_scatter(layers: range, blocks: Sequence[int], data: memoryview, heads: range | None = None) -> None:
                leg, (ring,) = rig.service._legs["w", 0], rig.agent._landing._current.values()
                if layers.start == 0 and 0 not in leg.pulled and leg.handle is not None:
                    leg.pulled.add(0)
                    rig.agent.pulled(leg.handle.handle_id, 0)
                    place = next(at for at in range(0, ring.region.num_bytes, 64) if ring.region.slice(at, 64) == data[:64])
                    ring.region.slice(place, 64)[:] = bytes(64)  # the second write, which lies
                scatter(layers, blocks, data, heads)

            rig.worker.cache.scatter = spoilt_scatter  # type: ignore[method-assign]  # the moment of the second write
            rig.gateway.start(prompt, rig.prefill)
            serving = asyncio.create_task(rig.prefill.prefill(prompt))
            await until(lambda: bool(rig.gateway.of(RequestFailed) or rig.gateway.of(RequestFinished)))
            await serving
            assert not rig.gateway.answers["w"].ids()
            assert rig.gateway.of(RequestFailed, "w")[0].code == "kv_corrupt"
            await rig.at_rest()

    play(go())


def test_kv_that_never_comes_is_a_typed_failure(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path, {"kv_transfer": {"write_timeout_s": 0.4}})) as rig:
            rig.prefill.answers_pulls = False
            prompt = Prompt("t", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            computed = rig.prefill.compute(prompt)
            rig.prefill.open(handle, computed)
            rig.prefill.done(prompt, handle, computed)  # nothing was pushed
            failure = await rig.gateway.failed("t")
            assert (failure.code, failure.retryable) == ("transfer_timeout", True)
            await rig.at_rest()

    play(go())


@pytest.mark.parametrize("mode", ["layered", "chunked"])
def test_a_prompt_that_waits_long_in_prefills_queue_is_no_silence(tmp_path: Path, mode: str) -> None:
    """A granted prompt's first message comes when prefill has got to it, which a busy prefill does late."""

    async def go() -> None:
        async with running(configuration(tmp_path, {"prefill": {"mode": mode}})) as rig:
            prompt = Prompt("s", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            long_s = 5 * rig.config.prefill.hang_timeout_s
            rig.service._legs["s", 0].silent_s = long_s
            await until(lambda: bool(rig.gateway.of(RequestFailed)) or rig.service._legs["s", 0].silent_s > long_s + 0.1)
            assert not rig.gateway.of(RequestFailed)
            computed = rig.prefill.compute(prompt)
            for span in rig.prefill.open(handle, computed):
                rig.prefill.push(handle.handle_id, span.message_idx)
            rig.prefill.done(prompt, handle, computed)
            await rig.gateway.finished("s")
            assert rig.gateway.answers["s"].ids() == expected(prompt.prompt_ids)[1:]
            await rig.at_rest()

    play(go())


def test_a_producer_that_falls_silent_between_its_messages_is_given_up(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path, {"prefill": {"hang_timeout_s": 0.2}})) as rig:
            prompt = Prompt("s", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            rig.prefill.open(handle, rig.prefill.compute(prompt))
            rig.prefill.push(handle.handle_id, 0)
            failure = await rig.gateway.failed("s")
            assert (failure.code, failure.retryable) == ("transfer_timeout", True) and failure.detail.startswith("1 of")
            await rig.at_rest()

    play(go())


def test_the_death_of_prefill_fails_what_has_not_landed_and_nothing_else(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            long = Prompt("long", 0, ids(20), with_max(GREEDY, 120))
            rig.gateway.start(long, rig.prefill)
            await rig.prefill.prefill(long)
            half = Prompt("half", 0, ids(40), GREEDY)
            rig.gateway.start(half, rig.prefill)
            rig.prefill.announce(half)
            handle = await rig.prefill.granted(half)
            rig.prefill.open(handle, rig.prefill.compute(half))
            rig.prefill.push(handle.handle_id, 0)
            await until(lambda: rig.service._legs["half", 0].landed == {0})
            assert rig.prefill.connection is not None
            await rig.prefill.connection.close()
            failure = await rig.gateway.failed("half")
            assert (failure.code, failure.phase, failure.retryable) == ("peer_gone", "kv.handoff", True)
            await rig.gateway.finished("long")
            assert rig.gateway.answers["long"].ids() == expected(long.prompt_ids, long.sampling)[1:]
            await rig.at_rest()  # the ended socket is taken for the process' end after a second

    play(go())


def test_a_producer_may_take_its_announcement_back_and_come_again(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt = Prompt("again", 0, ids(40), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            rig.prefill.post(Cancel(request_id="again", attempt=0, traceparent="", remaining_s=0.0, reason="no_grant"))
            await rig.prefill.fence(handle)
            await until(lambda: rig.service.pool.num_free_blocks == rig.service.pool.limits.num_blocks)
            del rig.prefill.handles["again", 0]
            await rig.prefill.prefill(prompt)
            await rig.gateway.finished("again")
            assert rig.gateway.answers["again"].ids() == expected(prompt.prompt_ids)[1:]
            await rig.at_rest()

    play(go())


def test_64_requests_wait_their_turn_in_a_pool_for_16(tmp_path: Path) -> None:
    async def go() -> None:
        # 20 prompt tokens and 12 more are 2 blocks.
        changes: dict[str, dict[str, object]] = {"decode": {"num_blocks": 34, "watermark_blocks": 2}}
        async with running(configuration(tmp_path, changes)) as rig:
            prompts = [Prompt(f"r{number}", 0, ids(20, number % 8), GREEDY) for number in range(64)]
            for prompt in prompts:
                rig.gateway.start(prompt, rig.prefill)
            await asyncio.gather(*(rig.prefill.prefill(prompt) for prompt in prompts))
            answers = {number: expected(ids(20, number)) for number in range(8)}
            for number, prompt in enumerate(prompts):
                await rig.gateway.finished(prompt.request_id)
                assert rig.gateway.answers[prompt.request_id].ids() == answers[number % 8][1:]
            assert not rig.gateway.of(Preempted)
            await rig.at_rest()

    play(go())


def test_what_never_fits_is_refused_with_the_limit(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path, {"decode": {"num_blocks": 8}})) as rig:
            prompt = Prompt("big", 0, ids(200), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            failure = await rig.gateway.failed("big")
            assert (failure.code, failure.retryable) == ("no_capacity", False)
            assert "this replica has 8 (on a CPU decode.num_blocks, on a GPU what gpu_memory_fraction" in failure.detail
            await rig.at_rest()

    play(go())


def test_another_models_histogram_fails_the_leg_and_gives_all_back(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt = Prompt("r", 0, ids(20), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            computed = rig.prefill.compute(prompt)
            rig.prefill.open(handle, computed)
            rig.prefill.done(prompt, handle, replace(computed, experts=packed(np.ones((8, 7), np.int32))))
            failure = await rig.gateway.failed("r")
            assert failure.code == "kv_mismatch" and "8 x 7, this model has 8 layers of" in failure.detail
            assert not rig.service.prompt_experts.total_LE.any()
            rig.prefill.blocks.free(computed.blocks)
            await rig.at_rest()

    play(go())


def test_a_prompt_computed_for_a_leg_that_was_cancelled_is_stale_and_one_for_another_handle_is_a_fault(tmp_path: Path) -> None:
    async def go() -> None:
        async with running(configuration(tmp_path)) as rig:
            prompt = Prompt("r", 0, ids(20), GREEDY)
            rig.gateway.start(prompt, rig.prefill)
            rig.prefill.announce(prompt)
            handle = await rig.prefill.granted(prompt)
            computed = rig.prefill.compute(prompt)
            other = msgspec.structs.replace(handle, handle_id=handle.handle_id + 1)
            rig.prefill.open(handle, computed)
            rig.prefill.open(other, computed)
            rig.prefill.done(prompt, other, computed)
            await until(lambda: [one.code for one in rig.prefill.of(Refused)] == ["unexpected_message"])
            rig.gateway.cancel("r")
            await rig.prefill.one(Cancel, "r")
            rig.prefill.done(prompt, handle, computed)
            await until(lambda: [one.code for one in rig.prefill.of(Refused)] == ["unexpected_message", "stale"])
            rig.prefill.blocks.free(computed.blocks)
            await rig.at_rest()

    play(go())
