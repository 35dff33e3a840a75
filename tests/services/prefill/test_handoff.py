"""What a prefill hands over: the right KV, pushed group by group, once or again; the right first tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from duomo.telemetry.span_file import read_spans
from duomo.wire.histogram import unpacked
from duomo.wire.messages import HandleOffered, PrefillDone, TransferFenced, WaveAnnounced
from duomo.wire.values import Sampling
from services.kv_transfer.faults import Fault
from services.prefill.pending import Over
from services.prefill.pieces import Piece
from services.prefill.worker import Computation
from tests.services.prefill.prefill_rig import NUM_SEND_SLOTS, Rig, expected_kv, first_token, ids, model, monolith_tokens, rig, run
from tests.services.prefill.scripted_peers import until


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 63, 257])
def test_landed_kv_and_first_token_are_those_of_the_engine_alone(tmp_path: Path, num_tokens: int) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            prompt = ids(num_tokens)
            parts.gateway.start("r", prompt, parts.decode.address)
            finished = await parts.gateway.finished("r")
            (token,) = parts.gateway.tokens("r")
            assert (token.token_id, token.index, token.finish_reason) == (first_token(prompt), 0, None)
            assert parts.decode.kv("r", num_tokens) == expected_kv(prompt)
            done = await parts.decode.inbox.one(PrefillDone, "r")
            assert isinstance(done, PrefillDone)
            assert done.first_token_ids == (token.token_id,) and done.ended_choices == ()
            assert done.expert_histogram is not None
            counts_LE = unpacked(done.expert_histogram)
            assert counts_LE.shape == (model().config.num_layers, model().config.num_experts)
            assert (counts_LE.sum(axis=1) == num_tokens * model().config.top_k).all()
            expert_bytes = 3 * model().config.hidden * model().config.expert_hidden * 4  # gate, up and down in float32
            assert parts.service.report().counters["expert_bytes_read"] == (counts_LE > 0).sum() * expert_bytes
            assert token.timings is not None and 0 < token.timings.compute_s <= token.timings.total_s <= finished.timings.total_s
            assert not parts.decode.inbox.of(TransferFenced), "a good end needs no fence"
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_wave_of_prompts_has_every_prompt_right(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            prompts = {f"r{length}": ids(length, seed=length) for length in (3, 40, 129, 200)}
            for name, prompt in prompts.items():
                parts.gateway.start(name, prompt, parts.decode.address)
            for name, prompt in prompts.items():
                await parts.gateway.finished(name)
                assert parts.gateway.tokens(name)[0].token_id == first_token(prompt), name
                assert parts.decode.kv(name, len(prompt)) == expected_kv(prompt), name
            await parts.is_clean()

    run(scenario, tmp_path)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_more_messages_than_slots_wait_for_credits(tmp_path: Path, slots: int) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.decode.num_ring_slots = slots
            prompt = ids(257)
            parts.gateway.start("r", prompt, parts.decode.address)
            await parts.gateway.finished("r")
            assert parts.decode.kv("r", 257) == expected_kv(prompt)
            await parts.is_clean()

    run(scenario, tmp_path)


def hold_writes(parts: Rig, messages_a_group: int) -> None:
    """A group's writes stay in flight until the next group computes, which waits for them: a machine on which both take their time."""
    run_piece, decode = parts.worker.run_piece, parts.decode.agent._transport.name

    def wait(check: Callable[[], bool], what: str) -> None:
        end_s = time.monotonic() + 60
        while not check():
            assert time.monotonic() < end_s, what
            time.sleep(0.001)

    def held(computation: Computation, piece: Piece) -> Over[float]:
        (group, _), agent = piece.groups, parts.agent
        if group > 0:
            wait(lambda: agent.counts().num_writes_in_flight == NUM_SEND_SLOTS, "nothing is pushed before all is computed")
            parts.hub.resume(decode)
            wait(lambda: agent.counts().counters.get("messages_pushed") == group * messages_a_group, "not all of a group was pushed")
        if group < 3:
            parts.hub.stop(decode)
        return run_piece(computation, piece)

    parts.worker.run_piece = held  # type: ignore[method-assign]  # how long each takes


def test_a_groups_push_is_in_flight_while_the_next_group_computes(tmp_path: Path) -> None:
    """A wave of three prompts over four groups, two messages of each a group: seen from the spans alone."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, piece_target_s=1e-9) as parts:
            hold_writes(parts, messages_a_group=3 * 2)
            parts.decode.is_granting, parts.decode.num_ring_slots = False, 48
            prompts = {name: ids(90, seed=seed) for seed, name in enumerate("abc", start=1)}
            for name, prompt in prompts.items():
                parts.gateway.start(name, prompt, parts.decode.address)
            await parts.decode.inbox.until(lambda: len(parts.decode.inbox.of(WaveAnnounced)) == 3)
            parts.decode.is_granting = True
            for name in prompts:
                await parts.gateway.finished(name)
                assert parts.decode.kv(name, 90) == expected_kv(prompts[name])
            await parts.is_clean()

    run(scenario, tmp_path)
    spans = read_spans(tmp_path / "spans")
    computes = [span for span in spans if span.name == "prefill.compute"]
    starts = [{event.attributes["duomo.group"]: event.at_ns for event in span.events if event.name == "group_started"} for span in computes]
    assert len(computes) == 3 and all(set(times) == {0, 1, 2, 3} for times in starts)
    assert len({span.attributes["duomo.wave"] for span in computes}) == 1, "the three prompts are one wave"
    pushes = {(span.parent_id, span.attributes["duomo.group"]): (span.start_ns, span.end_ns) for span in spans if span.name == "kv.push"}
    assert len(pushes) == 12
    overlapping = []
    for compute, times in zip(computes, starts, strict=True):
        ends = {event.attributes["duomo.group"]: event.at_ns for event in compute.events if event.name == "group_computed"}
        for group in range(3):
            push_start, push_end = pushes[compute.span_id, group]
            assert push_start >= ends[group] - 1_000_000, "nothing is pushed before it is computed"
            if push_start < ends[group + 1] and push_end > times[group + 1]:
                overlapping.append(group)
    assert set(overlapping) == {0, 1, 2} and len(overlapping) >= 6, f"pushes that overlap the next group: {overlapping}"


def test_choices_share_one_prefill_and_sample_apart(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            sampling = Sampling(max_tokens=8, temperature=1.5, seed=77, ignore_eos=True, logprobs=2)
            prompt = ids(33)
            parts.gateway.start("r", prompt, parts.decode.address, sampling=sampling, choices=(0, 1, 2))
            await parts.gateway.finished("r")
            tokens = parts.gateway.tokens("r")
            assert [token.choice for token in tokens] == [0, 1, 2]
            assert [token.token_id for token in tokens] == [first_token(prompt, sampling, choice) for choice in range(3)]
            assert len({token.token_id for token in tokens}) > 1
            assert all(token.logprob is not None and len(token.logprob.top) == 2 for token in tokens)
            (done,) = parts.decode.inbox.of(PrefillDone, "r")
            assert isinstance(done, PrefillDone) and done.first_token_ids == tuple(token.token_id for token in tokens)
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_resume_prefills_prompt_and_emitted_tokens(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            prompt, sampling = ids(21), Sampling(max_tokens=8, temperature=0.9, seed=5, ignore_eos=True, frequency_penalty=1.0)
            tokens = monolith_tokens(prompt, msgspec.structs.replace(sampling, max_tokens=6), 2)
            parts.gateway.start(
                "r", prompt, parts.decode.address, sampling=sampling, choices=(2,), emitted_ids=tuple(tokens[:5]), attempt=0
            )
            await parts.gateway.finished("r")
            (token,) = parts.gateway.tokens("r")
            assert (token.index, token.choice, token.token_id) == (5, 2, tokens[5])
            assert parts.decode.kv("r", 26) == expected_kv((*prompt, *tokens[:5]))

    run(scenario, tmp_path)


def test_a_prefix_seen_before_is_not_computed_again_and_changes_nothing(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, prefix_cache_blocks=64) as parts:
            first, second = ids(80), (*ids(80)[:70], *ids(50, seed=3))
            cached = {}
            for name, prompt, salt in (("a", first, ""), ("b", second, ""), ("c", first, ""), ("d", first, "other key")):
                parts.gateway.start(name, prompt, parts.decode.address, cache_salt=salt)
                cached[name] = (await parts.gateway.finished(name)).cached_tokens
                assert parts.gateway.tokens(name)[0].token_id == first_token(prompt), name
                assert parts.decode.kv(name, len(prompt)) == expected_kv(prompt), name
            assert cached == {"a": 0, "b": 64, "c": 64, "d": 0}, "full blocks only, one token left to compute, no other key's"
            await parts.is_clean()
            assert parts.service.report().num_cached_blocks > 0

    run(scenario, tmp_path)


def test_only_blocks_that_decode_lacks_are_sent(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.decode.first_block = 3
            prompt = ids(100)
            parts.gateway.start("r", prompt, parts.decode.address)
            await parts.gateway.finished("r")
            block_bytes, sent = 16 * 1024, parts.service.report().counters["messages_pushed"]
            (spans,) = parts.decode.spans.values()
            assert sent == len(spans) and sum(span.num_bytes for span in spans) == 4 * 8 * block_bytes
            got, want = parts.decode.cache.tensor[:, parts.decode.tables["r"][3:6]], expected_kv(prompt)
            num_layers, num_blocks = 8, 7
            rows = [want[(layer * num_blocks + 3) * block_bytes : (layer * num_blocks + 6) * block_bytes] for layer in range(num_layers)]
            assert got.contiguous().numpy().tobytes() == b"".join(rows)

    run(scenario, tmp_path)


def test_a_handle_for_blocks_that_the_prompt_has_not_is_refused(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.decode.first_block = -1
            parts.gateway.start("r", ids(100), parts.decode.address)
            failed = await parts.gateway.failed("r")
            assert (failed.code, failed.retryable) == ("stale_handle", True)
            await parts.decode.inbox.one(TransferFenced, "r")
            await until(lambda: parts.service.num_live_requests() == 0, "the leg lives on")
            assert not parts.service.report().counters.get("messages_pushed")

    run(scenario, tmp_path)


def test_a_corrupt_message_is_pulled_again(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, faults={1: Fault(corrupt_byte=100)}) as parts:
            prompt = ids(50)
            parts.gateway.start("r", prompt, parts.decode.address)
            await parts.gateway.finished("r")
            assert parts.decode.pulls == 1 and parts.service.report().counters["kv_pulls"] == 1
            assert parts.decode.kv("r", 50) == expected_kv(prompt)
            await parts.is_clean()

    run(scenario, tmp_path)


def test_a_push_is_told_with_its_rate_and_a_pulled_message_by_a_span_of_its_own(tmp_path: Path) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, faults={1: Fault(corrupt_byte=5)}) as parts:
            parts.gateway.start("r", ids(90), parts.decode.address)
            await parts.gateway.finished("r")
            assert parts.decode.kv("r", 90) == expected_kv(ids(90)) and parts.decode.pulls == 1
            await parts.is_clean()
            counters = parts.service.report().counters
            rates = [count for name, count in counters.items() if name.startswith("handoff_bytes_per_s.le.")]
            assert sum(rates) == 4 + 1 and counters["handoff_bytes_per_s.sum"] > 0

    run(scenario, tmp_path)
    pushes = [span.attributes for span in read_spans(tmp_path / "spans") if span.name == "kv.push"]
    groups = [push for push in pushes if not push["duomo.rewrite"]]
    (rewrite,) = [push for push in pushes if push["duomo.rewrite"]]
    assert sorted(push["duomo.group"] for push in groups) == [0, 1, 2, 3]
    block_bytes = 16 * 1024
    assert sum(int(str(push["duomo.bytes"])) for push in groups) == 6 * 8 * block_bytes and rewrite["duomo.messages"] == 1
    for push in pushes:
        assert push["duomo.way"] == "loopback" and "duomo.transport.bytes" not in push, "which measures nothing"
        assert all(float(str(push[f"duomo.{name}"])) > 0 for name in ("bytes_per_s", "pack_s", "write_s"))


def test_an_offer_that_comes_again_is_fenced_when_its_write_has_ended(tmp_path: Path) -> None:
    """Decode asks so for a fence that was lost with a socket: it must not believe that nothing is written while something is."""

    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir) as parts:
            parts.gateway.start("r", ids(40), parts.decode.address)
            parts.hub.stop(parts.decode.agent._transport.name)
            await parts.decode.inbox.until(lambda: parts.agent.counts().num_writes_in_flight > 0)
            (ring,) = parts.decode.agent._landing._current.values()
            (handle,) = ring.offered.values()
            offer = HandleOffered(request_id="r", attempt=0, traceparent="", remaining_s=0.0, handle=handle)
            parts.gateway.cancel("r")
            parts.decode.abort("r")
            parts.decode._post(offer)
            stranger = msgspec.structs.replace(handle, handle_id=handle.handle_id + 1000, request_id="nobody")
            parts.decode._post(msgspec.structs.replace(offer, request_id="nobody", handle=stranger))
            await parts.decode.inbox.one(TransferFenced, "nobody")
            assert not parts.decode.inbox.of(TransferFenced, "r"), "a write of it is in flight"
            parts.hub.resume(parts.decode.agent._transport.name)
            await parts.decode.inbox.one(TransferFenced, "r")
            await parts.is_clean()

    run(scenario, tmp_path)
