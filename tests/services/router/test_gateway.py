"""A request's life at the gateway, with real sockets and scripted faults: retries, resumes, typed errors, waiting for room, deadlines."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from pathlib import Path

import pytest

from duomo.telemetry.span_file import read_spans
from duomo.wire.messages import Cancel, RequestFinished, Resume, StartDecode, StartPrefill
from duomo.wire.values import EmittedToken
from services.router.flight import Choice, Flight
from services.router.pending import PendingLeg
from services.router.policy import Route
from services.router.pools import ReplicaLink
from tests.services.router.stub_chat import CHAT, chat, streamed, texts
from tests.services.router.stub_replicas import Fault, Script
from tests.services.router.stub_system import expire, stub_system


def test_repeated_and_reordered_frames_reach_the_client_once_and_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(duplicates_frames=True, reorders_frames=True)) as system:
            answers = await asyncio.gather(*(chat(system, n=3, max_tokens=33 + number) for number in range(5)))
            for number, answer in enumerate(answers):
                assert texts(answer) == [system.story.text(choice, 33 + number) for choice in range(3)]
                assert answer.json()["usage"]["completion_tokens"] == 3 * (33 + number)
            assert system.gateway.dropped_tokens["repeated"] > 0 and system.gateway.dropped_tokens["early"] > 0
            assert system.gateway.dropped_tokens["contradicted"] == 0

    asyncio.run(scenario())


def test_priority_reaches_both_pools_on_every_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("preempt", 6)]))
        async with stub_system(tmp_path, script) as system:
            assert texts(await chat(system, priority=-7)) == [system.story.text(0, 24)]
            prefill, decode = system.pools.of_role("prefill")[0], system.pools.of_role("decode")[0]
            starts = [*prefill.of_type(StartPrefill), *decode.of_type(StartDecode), *decode.of_type(Resume)]
            assert [start.priority for start in starts] == [7] * 4, "the wire's higher number goes first"

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["fail", "no_grant", "die"])
def test_a_failure_of_p_before_the_first_token_is_retried_on_another(tmp_path: Path, fault: Fault) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque([fault]))
        async with stub_system(tmp_path, script, num_prefills=2, num_decodes=2) as system:
            assert texts(await chat(system)) == [system.story.text(0, 24)]
            starts = [start for prefill in system.pools.of_role("prefill") for start in prefill.of_type(StartPrefill)]
            assert sorted(start.attempt for start in starts) == [0, 1]
            if fault == "no_grant":
                assert len({start.decode.replica_id for start in starts}) == 2, "the D that did not grant is avoided"
            else:
                assert all(len(prefill.of_type(StartPrefill)) == 1 for prefill in system.pools.of_role("prefill"))
            assert b"duomo_retries_total" in system.gateway.metrics.render()
            cancels = [cancel for decode in system.pools.of_role("decode") for cancel in decode.of_type(Cancel)]
            assert [cancel.attempt for cancel in cancels] == [0], "the void attempt is cancelled on D"

    asyncio.run(scenario())


def test_the_only_p_dies_and_its_request_waits_for_the_next_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(prefill_faults=deque(["die"]))) as system:
            asked = asyncio.create_task(chat(system))
            await system.until(lambda: not system.gateway.pools.prefills())
            await asyncio.sleep(0.1)
            assert not asked.done()
            await system.pools.add("prefill", system.directory)
            assert texts(await asked) == [system.story.text(0, 24)]

    asyncio.run(scenario())


def test_retries_are_bounded_and_what_cannot_be_retried_is_not(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["fail"] * 3 + ["fail_for_good"]))
        async with stub_system(tmp_path, script, overrides={"gateway": {"max_prefill_retries": 2}}) as system:
            bounded = await chat(system)
            assert (bounded.status_code, bounded.json()["error"]["code"]) == (503, "engine_failed")
            assert bounded.headers["retry-after"] == "1"
            final = await chat(system, stream=True)
            assert (final.status_code, final.json()["error"]["code"]) == (500, "engine_failed"), "before the first token it is a status"
            assert len(system.pools.of_role("prefill")[0].of_type(StartPrefill)) == 4

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["fail", "preempt"])
def test_after_the_first_token_a_choice_is_resumed_where_it_was(tmp_path: Path, fault: Fault) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([(fault, 5), (fault, 3)]))
        async with stub_system(tmp_path, script) as system:
            answer = await chat(system, stream=True)
            assert streamed(answer) == (system.story.text(0, 24), None)
            resumes = system.pools.of_role("decode")[0].of_type(Resume)
            prefills = system.pools.of_role("prefill")[0].of_type(StartPrefill)
            assert [len(resume.emitted_ids) for resume in resumes] == [6, 10] == [len(start.emitted_ids) for start in prefills[1:]]
            assert resumes[1].emitted_ids == tuple(system.story.token(0, index) for index in range(10))
            assert [resume.attempt for resume in resumes] == [1, 2] and resumes[0].sampling == prefills[0].sampling

    asyncio.run(scenario())


def test_one_of_several_choices_is_preempted_and_the_others_go_on(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("preempt", 4)]), step_s=0.002)
        async with stub_system(tmp_path, script) as system:
            assert texts(await chat(system, n=3)) == [system.story.text(choice, 24) for choice in range(3)]
            resumes = system.pools.of_role("decode")[0].of_type(Resume)
            start = system.pools.of_role("decode")[0].of_type(StartDecode)[0]
            assert [resume.choice for resume in resumes] == [0] and resumes[0].request_id != start.request_id

    asyncio.run(scenario())


def test_a_failed_leg_of_several_choices_resumes_each(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(decode_faults=deque([("fail", 4)]))) as system:
            assert texts(await chat(system, n=3)) == [system.story.text(choice, 24) for choice in range(3)]
            assert sorted(resume.choice for resume in system.pools.of_role("decode")[0].of_type(Resume)) == [0, 1, 2]

    asyncio.run(scenario())


def test_resumes_are_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("preempt", 2)] * 3))
        async with stub_system(tmp_path, script, overrides={"gateway": {"max_resumes": 2}}) as system:
            text, error = streamed(await chat(system, stream=True))
            assert error is not None and error["code"] == "preempted" and system.story.text(0, 24).startswith(text)

    asyncio.run(scenario())


def test_p_dies_after_the_first_token_before_d_has_the_prompt(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_finishes=False, decode_faults=deque([("hold", 0)]))
        async with stub_system(tmp_path, script, num_prefills=2) as system:
            asked = asyncio.create_task(chat(system))
            await system.until(lambda: any(link.legs and not link.book.queued_tokens for link in system.gateway.pools.prefills()))
            script.prefill_finishes = True
            (used,) = [prefill for prefill in system.pools.of_role("prefill") if prefill.of_type(StartPrefill)]
            await used.die()
            assert texts(await asked) == [system.story.text(0, 24)]
            assert len(system.pools.of_role("decode")[0].of_type(Resume)) == 1

    asyncio.run(scenario())


def test_p_dies_once_d_emits_and_nobody_cares(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_finishes=False, step_s=0.01)
        async with stub_system(tmp_path, script) as system:
            asked = asyncio.create_task(chat(system))
            await system.until(lambda: any(leg.has_landed for link in system.gateway.pools.decodes() for leg in link.legs))
            await system.pools.of_role("prefill")[0].die()
            assert texts(await asked) == [system.story.text(0, 24)]
            assert not system.pools.of_role("decode")[0].of_type(Resume)

    asyncio.run(scenario())


def test_64_requests_wait_in_order_for_a_pool_sized_for_16(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("hold", 3)] * 16))
        async with stub_system(tmp_path, script, num_blocks=16 * 3 + 8, overrides={"decode": {"watermark_blocks": 8}}) as system:
            asked = [asyncio.create_task(chat(system)) for _ in range(64)]
            (decode,) = system.pools.of_role("decode")
            await system.until(lambda: decode.num_running + system.gateway.num_waiting == 64)
            assert (decode.num_running, system.gateway.num_waiting) == (16, 48)
            system.pools.go_on.set()
            assert all(texts(answer) == [system.story.text(0, 24)] for answer in await asyncio.gather(*asked))
            assert decode.max_running == 16
            assert b'duomo_route_reasons_total{pool="decode",reason="only_one"} 64.0' in system.gateway.metrics.render()

    asyncio.run(scenario())


def test_the_line_is_bounded_and_what_never_fits_is_a_400(tmp_path: Path) -> None:
    async def scenario() -> None:
        overrides = {"gateway": {"max_queued_requests": 3}, "decode": {"watermark_blocks": 0}}
        script = Script(decode_faults=deque([("hold", 3)]))
        async with stub_system(tmp_path, script, num_blocks=4, overrides=overrides) as system:
            asked = [asyncio.create_task(chat(system)) for _ in range(8)]
            await system.until(lambda: sum(one.done() for one in asked) == 4)
            system.pools.go_on.set()
            answers = await asyncio.gather(*asked)
            codes = sorted(answer.status_code for answer in answers)
            assert codes == [200] * 4 + [429] * 4
            full = next(answer for answer in answers if answer.status_code == 429)
            assert full.headers["retry-after"] == "1" and full.json()["error"]["code"] == "queue_full"
            huge = await chat(system, max_tokens=500)
            assert huge.status_code == 400 and "64 tokens" in huge.json()["error"]["message"], huge.text

    asyncio.run(scenario())


def test_leaving_while_waiting_frees_the_place_in_the_line(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(decode_faults=deque([("hold", 3)]))
        async with stub_system(tmp_path, script, num_blocks=4, overrides={"decode": {"watermark_blocks": 0}}) as system:
            running = asyncio.create_task(chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            leaving, staying = asyncio.create_task(chat(system)), asyncio.create_task(chat(system))
            await system.until(lambda: system.gateway.num_waiting == 2)
            leaving.cancel()
            await system.until(lambda: system.gateway.num_waiting == 1)
            system.pools.go_on.set()
            assert texts(await running) == texts(await staying) == [system.story.text(0, 24)]

    asyncio.run(scenario())


def test_the_deadline_ends_a_request_with_a_typed_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["hold"]), decode_faults=deque([(None, 0), ("hold", 3)]))
        async with stub_system(tmp_path, script, overrides={"gateway": {"request_deadline_s": 1.5}}) as system:
            started_s = time.monotonic()
            late = await chat(system)
            assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
            assert time.monotonic() - started_s > 1.45


def test_what_is_cut_at_its_deadline_is_cancelled_on_both_sides(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(prefill_faults=deque(["hold"]))) as system:
            asked = asyncio.create_task(chat(system))
            await expire(system, 1)
            late = await asked
            assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
            prefill, decode = system.pools.of_role("prefill")[0], system.pools.of_role("decode")[0]
            await system.until(lambda: bool(prefill.of_type(Cancel)) and bool(decode.of_type(Cancel)))

    asyncio.run(scenario())


def test_a_replica_that_redis_forgot_stays_and_a_draining_one_gets_nothing_new(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, num_decodes=2) as system:
            first, second = system.pools.of_role("decode")
            await system.directory.remove(first.member)
            first.is_draining = True
            await system.until(lambda: sum(link.is_usable for link in system.gateway.pools.decodes()) == 1)
            for _ in range(3):
                assert (await chat(system)).status_code == 200
            assert not first.of_type(StartDecode) and len(second.of_type(StartDecode)) == 3
            system.redis.stop()
            await system.until(lambda: not system.gateway.pools.is_directory_reachable)
            assert (await chat(system)).status_code == 200, "an outage of Redis is nothing to clients"
            assert len(system.gateway.pools.links) == 3
            system.redis.start()

    asyncio.run(scenario())


def test_a_drain_refused_before_its_report_sends_the_request_elsewhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["draining"]))
        async with stub_system(tmp_path, script, num_prefills=2, overrides={"gateway": {"max_prefill_retries": 0}}) as system:
            answers = [await chat(system) for _ in range(3)]
            assert all(texts(answer) == [system.story.text(0, 24)] for answer in answers)
            counts = sorted(len(prefill.of_type(StartPrefill)) for prefill in system.pools.of_role("prefill"))
            assert counts == [1, 3], "who drains is asked once, and that costs no retry"

    asyncio.run(scenario())


def test_requests_spread_over_both_pools(tmp_path: Path) -> None:
    async def scenario() -> None:
        script = Script(prefill_faults=deque(["hold"] * 16))
        async with stub_system(tmp_path, script, num_prefills=2, num_decodes=2, num_blocks=64) as system:
            asked = [asyncio.create_task(chat(system, stream=True)) for _ in range(16)]
            await system.until(lambda: system.gateway.num_live_legs == 16)
            system.pools.go_on.set()
            answers = await asyncio.gather(*asked)
            assert all(streamed(answer) == (system.story.text(0, 24), None) for answer in answers)
            for replica in system.pools.replicas:
                assert len(replica.of_type(StartPrefill)) + len(replica.of_type(StartDecode)) >= 3, "not all take the same one"

    asyncio.run(scenario())


def test_a_request_leaves_one_trace_whose_parts_add_up(tmp_path: Path) -> None:
    async def scenario() -> None:
        spans = tmp_path / "spans"
        script = Script(prefill_s=0.05)
        async with stub_system(tmp_path, script, overrides={"tracing": {"directory": str(spans)}}) as system:
            parent = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
            answer = await system.client.post("/v1/chat/completions", json=CHAT | {"stream": True}, headers={"traceparent": parent})
            assert answer.status_code == 200
            await chat(system, model="nope")
            await system.until(lambda: len(read_spans(spans)) == 4)
            ours = {span.name: span for span in read_spans(spans) if span.trace_id == "a" * 32}
            root = ours["gateway.request"]
            assert root.parent_id == "b" * 16 and ours["gateway.tokenize"].parent_id == ours["gateway.route"].parent_id == root.span_id
            sent = system.pools.of_role("prefill")[0].of_type(StartPrefill)[0].traceparent
            assert root.span_id in sent and root.trace_id in sent, "both legs hang below the root"
            assert root.attributes["duomo.route_reason"] == root.attributes["duomo.route_decode_reason"] == "only_one"
            assert abs(float(root.attributes["duomo.ttft.prefill.compute_s"]) - 0.05) < 0.02
            refused = [span for span in read_spans(spans) if span.trace_id != "a" * 32]
            assert [span.error for span in refused] == ["model_not_found"]

    asyncio.run(scenario())


def test_stopping_ends_every_request_with_a_typed_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path, Script(prefill_faults=deque(["hold"]))) as system:
            asked = asyncio.create_task(chat(system))
            await system.until(lambda: system.gateway.num_live_legs == 1)
            await system.gateway.drain(0.05)
            refused = await chat(system)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            await system.gateway.stop()
            assert (await asked).json()["error"]["code"] == "shutting_down"

    asyncio.run(scenario())


def test_a_fault_of_ours_while_a_request_starts_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:  # which checks every book at its end
            placing = system.gateway._placing
            begin = placing.begin

            def begins_and_breaks(pending: PendingLeg, route: Route) -> None:
                begin(pending, route)
                raise ZeroDivisionError

            monkeypatch.setattr(placing, "begin", begins_and_breaks)
            assert (await chat(system)).status_code == 500
            monkeypatch.undo()
            assert texts(await chat(system)) == [system.story.text(0, 24)]

    asyncio.run(scenario())


def test_an_answer_that_cannot_be_written_ends_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others of the same frames go on, and so does the replica's connection."""

    async def scenario() -> None:
        async with stub_system(tmp_path, Script(step_s=0.005)) as system:
            write = Flight._accept

            def breaks_at_seven(self: Flight, choice: Choice, token: EmittedToken) -> None:
                if token.index == 7 and self.request.sampling.max_tokens == 20:
                    raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")
                write(self, choice, token)

            monkeypatch.setattr(Flight, "_accept", breaks_at_seven)
            broken, *others = await asyncio.gather(chat(system, max_tokens=20), *(chat(system) for _ in range(3)))
            assert (broken.status_code, broken.json()["error"]["code"]) == (500, "internal")
            assert all(texts(other) == [system.story.text(0, 24)] for other in others)
            assert b"duomo_resumes_total{" not in system.gateway.metrics.render()

    asyncio.run(scenario())


def test_a_message_that_cannot_be_taken_is_as_good_as_a_lost_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with stub_system(tmp_path) as system:
            listener, heard = system.gateway, []

            def breaks_once(link: ReplicaLink, message: RequestFinished) -> None:
                if link.role == "prefill" and not heard:
                    heard.append(message)
                    raise ZeroDivisionError
                finished(link, message)

            finished = listener.request_finished
            monkeypatch.setattr(listener, "request_finished", breaks_once)
            assert texts(await chat(system)) == [system.story.text(0, 24)]
            assert heard

    asyncio.run(scenario())
