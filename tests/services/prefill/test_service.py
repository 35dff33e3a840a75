"""How legs end on a prefill replica: refused, cancelled at each stage, failed with D, dropped with the gateway, drained."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from duomo.engine.sampler import RowSampling
from duomo.errors import EngineError, TransferError
from duomo.wire.messages import (
    CachesFlushed,
    Cancel,
    Drain,
    FlushCaches,
    PrefillDone,
    Refused,
    RequestFailed,
    TransferFenced,
    Undrain,
    WaveAnnounced,
)
from duomo.wire.values import Sampling
from services.kv_transfer.transport import Span, Write
from services.kv_transfer.transport_loopback import LoopbackTransport
from services.prefill.pending import Over
from services.prefill.pieces import Piece
from services.prefill.worker import Computation, WaveOutput
from tests.services.prefill.prefill_rig import Rig, expected_kv, first_token, ids, model, rig, run
from tests.services.prefill.scripted_peers import ScriptedGateway, until


def test_choices_that_end_with_their_first_token_end_here(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            prompt = ids(40)
            greedy = first_token(prompt)
            by_length = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
            by_stop = Sampling(max_tokens=9, temperature=0.0, stop_token_ids=(greedy,))
            not_yet = Sampling(max_tokens=9, temperature=0.0, stop_token_ids=(greedy,), min_tokens=3)
            for name, sampling in (("length", by_length), ("stop", by_stop), ("not_yet", not_yet)):
                parts.gateway.start(name, prompt, parts.decode.address, sampling=sampling)
                await parts.gateway.finished(name)
            (length,), (stop,), (other,) = (parts.gateway.tokens(name) for name in ("length", "stop", "not_yet"))
            assert (length.token_id, length.finish_reason) == (greedy, "length")
            assert (stop.token_id, stop.finish_reason) == (greedy, "stop")
            assert other.finish_reason is None and other.token_id != greedy
            ended = [one.ended_choices for one in parts.decode.inbox.messages if isinstance(one, PrefillDone)]
            assert ended == [(0,), (0,), ()]
            await parts.is_clean()

    run(scenario, tmp_path)


def test_no_grant_is_a_retryable_failure_and_a_late_grant_is_fenced(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, grant_timeout_s=0.2) as parts:
            parts.decode.is_granting = False
            parts.gateway.start("r", ids(20), parts.decode.address)
            failed = await parts.gateway.failed("r")
            assert (failed.code, failed.phase, failed.retryable) == ("no_grant", "kv.handoff", True)
            await parts.decode.inbox.one(Cancel, "r")
            assert parts.service.num_live_requests() == 0
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_dead_writer_thread_ends_the_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be pushed any more: requests fail, retryable elsewhere, and serve() raises, so that the replica is replaced."""

    def write(self: LoopbackTransport, local: Span, peer: str, remote: Span, notification: bytes) -> Write:
        raise KeyError("no such thing")

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            serving = asyncio.create_task(parts.service.membership.serve(asyncio.Event()))
            parts.service.check_health()
            parts.gateway.start("r", ids(40), parts.decode.address)
            failed = await parts.gateway.failed("r")
            assert failed.retryable and failed.phase == "kv.handoff"
            with pytest.raises(TransferError, match="writer thread"):
                parts.service.check_health()
            with pytest.raises(TransferError, match="writer thread"):
                await serving

    monkeypatch.setattr(LoopbackTransport, "write", write)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    run(scenario, tmp_path)


def test_a_message_that_crossed_a_cancel_and_is_refused_warns_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.gateway.start("r", ids(20), parts.decode.address)
            await parts.gateway.finished("r")
            for code in ("stale", "unexpected_message"):
                parts.decode._post(Refused(code=code, detail="refused here"))
            await until(lambda: sum("refused here" in record.message for record in caplog.records) == 2, "not logged")

    caplog.set_level(logging.INFO, "services.prefill.service")
    run(scenario, tmp_path)
    assert [record.levelname for record in caplog.records if "refused here" in record.message] == ["INFO", "WARNING"]


STAGES = ("queued", "announced", "granted", "computing", "handing_off")


def hold_pieces(parts: Rig) -> threading.Event:
    """Each wave's last piece stands still in the step thread until this is set, so that whoever looks meets the stage."""
    gate, run_piece = threading.Event(), parts.worker.run_piece

    def held(computation: Computation, piece: Piece) -> Over[float]:
        assert piece.groups[1] < parts.worker.num_groups or gate.wait(60), "nobody opened it"
        return run_piece(computation, piece)

    parts.worker.run_piece = held  # type: ignore[method-assign]  # a machine that takes its time
    return gate


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancel_at_any_stage_gives_everything_back_and_harms_no_other(tmp_path: Path, stage: str) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, transfer={"max_bytes_per_s": 3e7}, max_wave_prompts=2, max_wave_tokens=400, num_blocks=80) as parts:
            decode, gateway, gate = parts.decode, parts.gateway, hold_pieces(parts)
            decode.is_granting = stage not in ("queued", "announced")
            decode.is_draining = stage != "handing_off"
            fillers = {"queued": ("f0", "f1"), "granted": ("f0",)}.get(stage, ())
            for name in fillers:
                gateway.start(name, ids(30 if stage == "queued" else 300, seed=9), decode.address)
            if stage == "queued":
                await decode.inbox.until(lambda: len(decode.inbox.of(WaveAnnounced)) == 2)
            gateway.start("gone", ids(290), decode.address)
            if stage == "handing_off":
                gate.set()
            await until(lambda: stage in stages_of(parts, "gone"), f"never {stage}")
            gateway.cancel("gone")
            await until(lambda: not stages_of(parts, "gone"), "the leg lives on", 1.0)
            gate.set()
            decode.abort("gone")
            decode.is_granting = decode.is_draining = True
            decode.pump()
            gateway.start("stays", ids(64, seed=4), decode.address)
            for name in (*fillers, "stays"):
                await gateway.finished(name)
            assert decode.kv("stays", 64) == expected_kv(ids(64, seed=4))
            assert not gateway.inbox.of(RequestFailed) and (stage == "handing_off" or not gateway.tokens("gone"))
            await parts.is_clean()

    run(scenario, tmp_path)


def stages_of(parts: Rig, request_id: str) -> list[str]:
    """Where the legs of a request are: the one look inside, to hit a stage."""
    legs = parts.service._book._legs.values()
    found = [leg for leg in legs if leg.request.request_id == request_id]
    if found and found[0].stage == "granted" and found[0].is_in_wave:
        return ["granted", "computing"]
    return [str(leg.stage) for leg in found]


def test_a_choice_taken_back_is_neither_emitted_nor_decoded(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.decode.is_granting = False
            parts.gateway.start("r", ids(30), parts.decode.address, choices=(0, 1))
            await parts.decode.inbox.one(WaveAnnounced, "r")
            parts.gateway.cancel("r", choice=0)
            (leg,) = parts.service._book._legs.values()
            await until(lambda: leg.cancelled_choices == {0}, "the cancel does not come")
            parts.decode.is_granting = True
            await parts.gateway.finished("r")
            assert [token.choice for token in parts.gateway.tokens("r")] == [1]
            (done,) = parts.decode.inbox.of(PrefillDone, "r")
            assert isinstance(done, PrefillDone) and done.ended_choices == (0,) and len(done.first_token_ids) == 2
            await parts.is_clean()

    run(scenario, tmp_path)


@pytest.mark.parametrize("stage", ["announced", "computing", "handing_off"])
def test_decodes_death_is_a_typed_failure_and_nothing_stays(tmp_path: Path, stage: str) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, transfer={"max_bytes_per_s": 3e7}) as parts:
            gate = hold_pieces(parts)
            parts.decode.is_granting = stage != "announced"
            parts.decode.is_draining = stage != "handing_off"
            parts.gateway.start("r", ids(300), parts.decode.address)
            if stage == "handing_off":
                gate.set()
            await until(lambda: stage in stages_of(parts, "r"), f"never {stage}")
            parts.hub.kill("d")
            await parts.decode.connections[0].close()
            failed = await parts.gateway.failed("r")
            assert failed.retryable and failed.phase == "kv.handoff", failed
            await until(lambda: parts.service.num_live_requests() == 0, "the leg lives on", 1.0)
            gate.set()
            num_known = 300 // 16 if stage == "handing_off" else 0  # computed, though never handed off

            def is_back() -> bool:
                report = parts.service.report()
                return report.num_free_blocks + report.num_cached_blocks == report.num_blocks and report.num_open_spans == 0

            await until(is_back, "something is still held", 1.0)
            assert (parts.service.report().num_cached_blocks, parts.service.report().num_open_handles) == (num_known, 0)

    run(scenario, tmp_path)


def test_an_unreachable_decode_replica_is_a_typed_failure(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            nobody = parts.decode.address.__class__(replica_id="x", boot_id="0" * 16, address=f"unix:{run_dir}/nobody.sock")
            other = parts.decode.address.__class__(replica_id="x", boot_id="1" * 16, address=parts.decode.address.address)
            parts.gateway.start("a", ids(20), nobody)
            parts.gateway.start("b", ids(20), other)
            assert (await parts.gateway.failed("a")).code == "unreachable"
            assert (await parts.gateway.failed("b")).code == "peer_restarted"
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_gateways_death_cancels_its_requests(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            second = await ScriptedGateway.dial(parts.service.membership.identity.address, model().config, parts.config)
            parts.decode.is_granting = False
            second.start("dies", ids(40), parts.decode.address)
            parts.gateway.start("lives", ids(41), parts.decode.address)
            await parts.decode.inbox.until(lambda: len(parts.decode.inbox.of(WaveAnnounced)) == 2)
            await second.close()
            await until(lambda: parts.service.num_live_requests() == 1, "the dead gateway's request lives on", 1.0)
            parts.decode.is_granting = True
            await parts.gateway.finished("lives")
            await parts.decode.inbox.one(TransferFenced, "dies")
            parts.decode.abort("dies")
            await parts.is_clean()

    run(scenario, tmp_path)


def test_draining_finishes_the_live_and_refuses_the_new(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.gateway.start("old", ids(200), parts.decode.address)
            await parts.decode.inbox.one(WaveAnnounced, "old")
            draining = asyncio.create_task(parts.service.drain(10.0))
            await asyncio.sleep(0)
            parts.gateway.start("new", ids(20), parts.decode.address)
            failed = await parts.gateway.failed("new")
            assert (failed.code, failed.retryable, failed.phase) == ("draining", True, "prefill.queue")
            await parts.gateway.finished("old")
            assert await draining

    run(scenario, tmp_path)


def test_a_drain_that_stays_is_taken_back_and_a_flush_forgets(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            cached = []
            for number in range(3):
                parts.gateway.start(f"before {number}", ids(70), parts.decode.address)
                cached.append((await parts.gateway.finished(f"before {number}")).cached_tokens)
                if number == 1:
                    parts.gateway.connection.post(FlushCaches(flush_id=5))
                    answer = CachesFlushed(flush_id=5, num_blocks=4)
                    await parts.gateway.inbox.until(lambda answer=answer: answer in parts.gateway.inbox.messages)
                    parts.service._book.blocks.manager.check_integrity()
            assert cached == [0, 64, 0]
            parts.gateway.connection.post(Drain(deadline_s=0.0, ends=False))
            parts.gateway.start("refused", ids(20), parts.decode.address)
            assert (await parts.gateway.failed("refused")).code == "draining"
            parts.gateway.connection.post(Undrain())
            parts.gateway.start("taken", ids(20), parts.decode.address)
            await parts.gateway.finished("taken")
            await parts.is_clean()

    run(scenario, tmp_path)


def test_what_cannot_be_prefilled_is_refused_by_name(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, num_blocks=8) as parts:
            parts.gateway.start("vocab", (1, 9999), parts.decode.address)
            parts.gateway.start("context", ids(2049), parts.decode.address)
            parts.gateway.start("blocks", ids(129), parts.decode.address)
            parts.gateway.start("late", ids(20), parts.decode.address, remaining_s=0.0)
            codes = {name: (await parts.gateway.failed(name)).code for name in ("vocab", "context", "blocks", "late")}
            assert codes == {
                "vocab": "bad_token_id",
                "context": "prompt_too_long",
                "blocks": "prompt_too_long",
                "late": "deadline_exceeded",
            }
            parts.gateway.start("twice", ids(20), parts.decode.address)
            parts.gateway.start("twice", ids(20), parts.decode.address)
            await parts.gateway.finished("twice")
            (refused,) = parts.gateway.inbox.of(Refused)
            assert isinstance(refused, Refused) and refused.code == "duplicate_request"
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_prompt_without_logits_takes_what_it_found_out_of_the_cache(tmp_path: Path) -> None:
    """What is wrong may lie in the blocks that it was given: the next one computes them anew."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            worker, prompt = parts.worker, ids(100)
            healthy, error = (
                worker.sample,
                EngineError("its logits hold a NaN", code="bad_logits", phase="prefill.compute", retryable=False),
            )

            def without(computation: Computation, rows: Sequence[Sequence[RowSampling]]) -> Over[tuple[WaveOutput, ...]]:
                return Over(tuple(replace(one, sampled=(), error=error) for one in healthy(computation, rows).wait()))

            parts.gateway.start("known", prompt, parts.decode.address)
            await parts.gateway.finished("known")
            worker.sample = without  # type: ignore[method-assign]  # the fault is planted here
            parts.gateway.start("bad", prompt, parts.decode.address)
            assert (await parts.gateway.failed("bad")).code == "bad_logits"
            assert parts.service.report().counters["prefill_tokens_cached"] == 96
            worker.sample = healthy  # type: ignore[method-assign]  # and taken away
            parts.gateway.start("again", prompt, parts.decode.address)
            assert (await parts.gateway.finished("again")).cached_tokens == 0
            parts.decode.abort("bad")
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_report_tells_what_is_left_to_compute_and_how_fast_it_goes(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, max_wave_tokens=400) as parts:
            before, prompt = parts.service.report(), ids(100)
            assert (before.num_work_tokens, before.tokens_per_s, before.step_s) == (0, 0.0, 0.0), "nothing was measured"
            parts.gateway.start("small", ids(80, seed=3), parts.decode.address)
            await parts.gateway.finished("small")
            small = parts.service.report()
            assert small.tokens_per_s == 0.0 < small.step_s, "less than a quarter of a full wave says nothing of its speed"
            parts.gateway.start("known", prompt, parts.decode.address)
            await parts.gateway.finished("known")
            after = parts.service.report()
            assert after.num_work_tokens == 0 and after.tokens_per_s > 0 < after.step_s
            parts.decode.is_granting = False
            parts.gateway.start("same", prompt, parts.decode.address)
            parts.gateway.start("other", ids(70, seed=9), parts.decode.address)
            await until(lambda: parts.service.report().num_queued == 2, "they do not wait")
            assert parts.service.report().num_work_tokens == 4 + 70, "6 of the 7 blocks of the first are known"
            assert parts.service.report().num_queued_tokens == 170
            for name in ("same", "other"):
                parts.gateway.cancel(name)
            await until(lambda: parts.service.num_live_requests() == 0, "they live on")
            assert parts.service.report().num_work_tokens == 0

    run(scenario, tmp_path)


def test_a_step_that_fails_fails_its_wave_alone(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            worker = parts.worker
            healthy, num_runs = worker.run_piece, 0

            def fails_once(computation: Computation, piece: Piece) -> Over[float]:
                nonlocal num_runs
                num_runs += 1
                if num_runs == 2:
                    raise RuntimeError("out of memory")
                return healthy(computation, piece)

            worker.run_piece = fails_once  # type: ignore[method-assign]  # the fault is planted here
            parts.gateway.start("fails", ids(60), parts.decode.address)
            failed = await parts.gateway.failed("fails")
            assert (failed.code, failed.phase, failed.retryable) == ("engine_failed", "prefill.compute", True)
            await parts.decode.inbox.one(TransferFenced, "fails")
            parts.gateway.start("works", ids(61), parts.decode.address)
            await parts.gateway.finished("works")
            parts.service.check_health()
            await parts.is_clean()

    run(scenario, tmp_path)
