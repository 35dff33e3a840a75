"""Prefill and decode in one process over one block pool: right tokens, nothing moved, every block back however a leg ends."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from duomo.config import DuomoConfig
from duomo.errors import EngineError
from duomo.telemetry.span_file import read_spans
from duomo.wire.messages import Drain, HandleOffered, RequestFailed, RequestFinished, StartPrefill
from duomo.wire.values import PeerAddress, Sampling
from services.colocated import Engine
from services.decode.worker import StepInput, StepOutput
from services.prefill.pending import Pending
from services.prefill.pieces import Piece
from services.prefill.worker import Computation
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import GREEDY, expected, ids, until
from tests.services.pair_rig import System, address_of, colocated

Scenario = Callable[[Engine, System], Coroutine[Any, Any, None]]


def told(folder: Path, **sections: dict[str, object]) -> DuomoConfig:
    config = configuration(folder, {"tracing": {"directory": str(folder / "spans")}, **sections})
    return DuomoConfig.model_validate(config.model_dump() | {"layout": "colocated"})


def play(config: DuomoConfig, scenario: Scenario, *, has_broken: bool = False) -> None:
    async def go() -> None:
        async with asyncio.timeout(110), colocated(config) as (engine, made):
            await scenario(engine, made)
            await made.at_rest()
            engine.loans.manager.check_integrity()
            assert (engine.loans.num_taken_blocks, engine.loans.counts().num_open_handles) == (0, 0)
            assert not any(service.report().num_open_handles for service in (engine.prefill, engine.decode))
            if not has_broken:
                engine.prefill.check_health()
                engine.decode.check_health()

    asyncio.run(go())


def test_prompts_of_odd_sizes_and_nothing_moves(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        sizes = (1, 15, 16, 17, 63, 257)
        for size in sizes:
            made.start(f"r{size}", ids(size, size), GREEDY, p=0, d=0)
        for size in sizes:
            await made.ended(f"r{size}", p=0, d=0)
            assert made.tokens(f"r{size}", p=0, d=0) == expected(ids(size, size))
        for service in (engine.prefill, engine.decode):
            report = service.report()
            assert (report.transport, report.num_slots, report.num_blocks) == ("owner change", 0, 96)
        assert not engine.decode.report().counters.get("landed_bytes")

    play(told(tmp_path), scenario)
    handoffs = [span for span in read_spans(tmp_path / "spans") if span.name == "kv.handoff"]
    assert len(handoffs) == 6
    for span in handoffs:
        assert (span.attributes["duomo.way"], span.attributes["duomo.bytes"], span.attributes["duomo.messages"]) == ("owner change", 0, 0)
        assert span.attributes["duomo.exposed_s"] == 0.0


def test_choices_fork_the_blocks_and_single_tokens_end_on_prefill(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        sampling = Sampling(max_tokens=10, temperature=0.8, seed=5, ignore_eos=True)
        made.start("n", ids(21), sampling, p=0, d=0, choices=(0, 1, 2))
        one = Sampling(max_tokens=1, temperature=0.0)
        made.start("one", ids(40), one, p=0, d=0)
        await made.ended("n", p=0, d=0)
        await made.ended("one", p=0, d=0)
        for choice in range(3):
            assert made.tokens("n", p=0, d=0, choice=choice) == expected(ids(21), sampling, choice)
        assert made.tokens("one", p=0, d=0) == expected(ids(40), one)

    play(told(tmp_path), scenario)


def hold_pieces(engine: Engine, from_group: int) -> threading.Event:
    """Pieces from this group on stand still in the step thread until this is set, so that whoever looks finds them there."""
    gate, worker = threading.Event(), engine.prefill._book.waves._worker
    run_piece = worker.run_piece

    def held(computation: Computation, piece: Piece) -> Pending[float]:
        assert piece.groups[0] < from_group or gate.wait(100), "nobody opened it"
        return run_piece(computation, piece)

    worker.run_piece = held  # type: ignore[method-assign]  # a machine that takes its time
    return gate


def test_a_cancelled_wave_keeps_its_blocks_until_its_group_is_over(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        pool, gate = engine.loans.manager, hold_pieces(engine, from_group=0)
        made.start("r", ids(100), GREEDY, p=0, d=0)
        await until(lambda: engine.loans.num_taken_blocks == 7)
        for gateway in (made.prefills[0][1], made.decodes[0][1]):
            gateway.cancel("r")
        await until(lambda: engine.decode.num_live_requests() == 0)
        assert (engine.loans.num_taken_blocks, pool.num_free) == (7, 96 - 7), "the step thread may still write them"
        gate.set()
        await until(lambda: pool.num_free == 96)
        assert engine.prefill.report().num_steps < 4, "a cancelled wave ends at its next group"

    play(told(tmp_path), scenario)


def test_a_known_prefix_is_shared_from_the_grant_on(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        pool, prompt = engine.loans.manager, ids(100)
        longer = (*prompt, *ids(30, 9))
        made.start("first", prompt, GREEDY, p=0, d=0)
        await made.ended("first", p=0, d=0)
        assert pool.num_cached == 6
        made.start("again", prompt, GREEDY, p=0, d=0)
        made.start("longer", longer, GREEDY, p=0, d=0)
        for name, tokens in (("again", prompt), ("longer", longer)):
            await made.ended(name, p=0, d=0)
            assert made.tokens(name, p=0, d=0) == expected(tokens)
            assert made.prefills[0][1].of(RequestFinished, name)[0].cached_tokens == 96
        assert engine.prefill.report().counters["prefill_tokens_cached"] == 2 * 96

    play(told(tmp_path, decode={"prefix_cache_blocks": 40}), scenario)


def test_a_following_turn_computes_only_what_the_one_before_left(tmp_path: Path) -> None:
    """The answer's blocks are known as well, but for its last token's, which was never fed; not under another key."""

    async def scenario(engine: Engine, made: System) -> None:
        asked, told_so = ids(90), with_tokens(70)
        made.start("turn 1", asked, told_so, p=0, d=0, salt="key")
        await made.ended("turn 1", p=0, d=0)
        answered = (*asked, *made.tokens("turn 1", p=0, d=0))
        assert len(answered) == 160
        for name, salt, cached in (("turn 2", "key", 144), ("other", "other key", 0)):  # 159 tokens were fed: 9 blocks
            prompt = (*answered, *ids(25, 9))
            made.start(name, prompt, told_so, p=0, d=0, salt=salt)
            await made.ended(name, p=0, d=0)
            assert made.tokens(name, p=0, d=0) == expected(prompt, told_so)
            assert made.prefills[0][1].of(RequestFinished, name)[0].cached_tokens == cached
        counters = engine.decode.report().counters
        assert (counters["granted_tokens_cached"], counters["granted_tokens_missing"]) == (144, 90 + 41 + 185)
        assert engine.prefill.report().counters["prefill_tokens_computed"] == 90 + 41 + 185
        digests = engine.decode.report().prefix_digests
        assert digests and digests == engine.prefill.report().prefix_digests and not counters.get("unsent_bytes")

    play(told(tmp_path), scenario)


def test_blocks_that_a_cancelled_wave_still_held_are_granted_once_they_are_back(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        gate = hold_pieces(engine, from_group=2)
        made.start("big", ids(150), GREEDY, p=0, d=0)
        await until(lambda: engine.prefill.report().num_steps == 2)  # so near its end that the next prompt is announced
        for gateway in (made.prefills[0][1], made.decodes[0][1]):
            gateway.cancel("big")
        made.start("next", ids(151, 2), GREEDY, p=0, d=0)
        await until(lambda: engine.decode.num_live_requests() == 1)
        gate.set()
        await made.ended("next", p=0, d=0)  # it waits for its blocks, not for a timeout
        assert made.tokens("next", p=0, d=0) == expected(ids(151, 2))

    play(told(tmp_path, decode={"num_blocks": 12}, delays={"prefill_group_s": 0.2}, prefill={"grant_timeout_s": 1000.0}), scenario)


@pytest.mark.parametrize("prefix_cache_blocks", [0, 24])
def test_a_small_pool_serves_more_than_fit_and_preempts_rightly(tmp_path: Path, prefix_cache_blocks: int) -> None:
    """24 blocks, legs that outgrow their promise, with a common prefix: preempted or not, the tokens are right and no promise breaks."""
    sections: dict[str, dict[str, object]] = {
        "decode": {"num_blocks": 24, "watermark_blocks": 1, "admit_ahead_tokens": 1, "prefix_cache_blocks": prefix_cache_blocks},
        "prefill": {"grant_timeout_s": 30.0},
    }

    async def scenario(engine: Engine, made: System) -> None:
        long, common = Sampling(max_tokens=70, temperature=0.0, ignore_eos=True), ids(80)
        made.start("first", common, with_tokens(2), p=0, d=0)
        await made.ended("first", p=0, d=0)
        prompts = {f"r{number}": common + ids(7, 3 + number) for number in range(6)}
        for name, prompt in prompts.items():
            made.start(name, prompt, long, p=0, d=0)
        to_decode = made.decodes[0][1]
        gone: set[str] = set()
        to_decode.on_preempted = lambda message: gone.add(message.request_id)

        def is_over(name: str) -> bool:
            return name in gone or bool(to_decode.of(RequestFinished, name) or to_decode.of(RequestFailed, name))

        for name, prompt in prompts.items():
            await until(functools.partial(is_over, name))
            assert not to_decode.of(RequestFailed, name), to_decode.of(RequestFailed, name)
            if name not in gone:
                assert made.tokens(name, p=0, d=0) == expected(prompt, long)
        assert gone and len(gone) < len(prompts), gone

    play(told(tmp_path, **sections), scenario)


def test_groups_and_steps_take_turns(tmp_path: Path) -> None:
    """While a sequence decodes, a prompt of many groups goes on, and between two of its steps lies at most one group."""

    async def scenario(engine: Engine, made: System) -> None:
        ran: list[str] = []
        decode, prefill = engine.decode._steps._worker, engine.prefill._book.waves._worker
        run, run_piece = decode.run, prefill.run_piece

        def seen_step(step: StepInput) -> StepOutput | None:
            ran.append("step")
            return run(step)

        def seen_piece(computation: Computation, piece: Piece) -> Pending[float]:
            ran.append("group")
            return run_piece(computation, piece)

        decode.run, prefill.run_piece = seen_step, seen_piece  # type: ignore[method-assign]  # witnesses of the turns
        made.start("short", ids(5), with_tokens(60), p=0, d=0)
        await until(lambda: ran.count("step") > 2)
        made.start("long", ids(300), GREEDY, p=0, d=0)
        made.start("other", ids(200, 2), GREEDY, p=0, d=0)
        for name in ("short", "long", "other"):
            await made.ended(name, p=0, d=0)
        assert made.tokens("short", p=0, d=0) == expected(ids(5), with_tokens(60))
        assert made.tokens("long", p=0, d=0) == expected(ids(300))
        first, last = ran.index("step"), len(ran) - 1 - ran[::-1].index("step")
        between = [len(list(run)) for turn, run in itertools.groupby(ran[first:last]) if turn == "group"]
        assert len(between) >= 8 and set(between) == {1}, ran

    play(told(tmp_path, delays={"prefill_group_s": 0.005}, model={"units": 8}), scenario)


def with_tokens(max_tokens: int) -> Sampling:
    return Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def test_a_grant_taken_back_before_its_wave_starts_is_a_typed_failure(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        book = engine.prefill._book
        granted = book.granted

        def taken_back_at_once(message: HandleOffered) -> None:
            granted(message)
            assert engine.prefill.report().num_open_handles == 1
            engine.loans.end(message.handle.handle_id)

        book.granted = taken_back_at_once  # type: ignore[method-assign]  # before the loop gets to a wave
        made.start("r", ids(30), GREEDY, p=0, d=0)
        failed = await made.prefills[0][1].failed("r")
        assert (failed.code, failed.retryable) == ("grant_withdrawn", True)
        await until(lambda: engine.prefill.num_live_requests() == 0)
        made.decodes[0][1].cancel("r")
        book.granted = granted  # type: ignore[method-assign]  # its own again
        made.start("next", ids(30), GREEDY, p=0, d=0)
        await made.ended("next", p=0, d=0)
        assert made.tokens("next", p=0, d=0) == expected(ids(30))

    play(told(tmp_path), scenario)


def test_a_decode_replica_of_another_process_is_refused_at_once(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        elsewhere = PeerAddress(replica_id="d9", boot_id="elsewhere", address="unix:/nowhere")
        start = StartPrefill(
            request_id="r",
            attempt=0,
            traceparent="",
            remaining_s=9.0,
            prompt_ids=ids(5),
            sampling=GREEDY,
            choices=(0,),
            decode=elsewhere,
        )
        made.prefills[0][1].post(start)
        failed = await made.prefills[0][1].failed("r")
        assert (failed.code, failed.phase, failed.retryable) == ("not_colocated", "kv.handoff", True)

    play(told(tmp_path), scenario)


def test_whichever_breaks_takes_the_other_with_it(tmp_path: Path) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        serving = asyncio.create_task(engine.serve(asyncio.Event()))
        await asyncio.sleep(0.05)
        assert engine.prefill._loop_task is not None
        engine.prefill._loop_task.cancel()
        with pytest.raises(EngineError, match="the wave loop has ended"):
            await serving
        assert engine.prefill.report().is_draining and engine.decode.report().is_draining

    play(told(tmp_path), scenario, has_broken=True)


def test_what_is_no_typed_error_ends_the_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(over: asyncio.Event) -> None:
        raise RuntimeError("a programmer's fault")

    async def scenario(engine: Engine, made: System) -> None:
        monkeypatch.setattr(engine.decode.membership, "serve", broken)
        with pytest.raises(RuntimeError, match="a programmer's fault"):
            await engine.serve(asyncio.Event())

    play(told(tmp_path), scenario)


@pytest.mark.parametrize("side", [0, 1])
def test_a_drain_of_either_drains_both_and_finishes_what_lives(tmp_path: Path, side: int) -> None:
    async def scenario(engine: Engine, made: System) -> None:
        serving = asyncio.create_task(engine.serve(asyncio.Event()))
        made.start("r", ids(40), GREEDY, p=0, d=0)
        await until(lambda: engine.decode.num_live_requests() == 1 and engine.prefill.num_live_requests() == 1)
        (made.prefills, made.decodes)[side][0][1].post(Drain(deadline_s=20.0))
        await made.ended("r", p=0, d=0)
        assert made.tokens("r", p=0, d=0) == expected(ids(40))
        await serving
        assert engine.prefill.report().is_draining and engine.decode.report().is_draining
        assert address_of(engine.prefill).boot_id != address_of(engine.decode).boot_id

    play(told(tmp_path, delays={"prefill_group_s": 0.05}), scenario)
