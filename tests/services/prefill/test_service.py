"""The prefill service with a scripted decode replica and gateway: real sockets, real agents over loopback, the real model."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from duomo.config import DuomoConfig
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.monolith import GenerateRequest, Monolith, MonolithLimits
from duomo.engine.runner import ModelRunner
from duomo.models.qwen3_moe import Model, load_model
from duomo.telemetry.span_file import read_spans
from duomo.telemetry.tracing import Tracing, configure
from duomo.wire.messages import (
    Cancel,
    PrefillDone,
    Refused,
    RequestFailed,
    Sampling,
    TransferFenced,
    WaveAnnounced,
)
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import Fault, ScriptedFaults
from services.kv_transfer.membership import ReplicaCard
from services.kv_transfer.transport_loopback import LoopbackHub
from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker, WorkerSizes
from tests.services.prefill.scripted_peers import GREEDY, ScriptedDecode, ScriptedGateway, kv_bytes, until

MODEL_DIR = Path(__file__).parents[3] / "models" / "tiny-moe"
BLOCK_TOKENS = 16


@functools.cache
def model() -> Model:
    torch.set_num_threads(1)  # the expectations are computed beside the service
    return load_model(MODEL_DIR)


def ids(num_tokens: int, seed: int = 1) -> tuple[int, ...]:
    return tuple((seed * 7919 + place * 31 + place * place) % 8000 + 10 for place in range(num_tokens))


def expected_kv(token_ids: tuple[int, ...]) -> bytes:
    """The same KV computed in one step by the engine alone."""
    num_blocks = -(-len(token_ids) // BLOCK_TOKENS)
    cache = KvCache(kv_spec(model().config, BLOCK_TOKENS), num_blocks)
    table = list(range(num_blocks))
    ModelRunner(model(), cache).run(StepBatch(slices=(PromptSlice(token_ids=token_ids, start=0, block_table=table),)))
    return kv_bytes(cache, table, len(token_ids))


@functools.cache
def first_token(token_ids: tuple[int, ...], sampling: Sampling = GREEDY, choice: int = 0) -> int:
    return monolith_tokens(token_ids, msgspec.structs.replace(sampling, max_tokens=1), choice)[0]


def monolith_tokens(token_ids: tuple[int, ...], sampling: Sampling, choice: int) -> list[int]:
    num_blocks = -(-(len(token_ids) + sampling.max_tokens) // BLOCK_TOKENS)
    request = GenerateRequest(prompt_ids=token_ids, sampling=sampling, choice=choice)
    return [one.token_id for one in Monolith(model(), MonolithLimits(), num_blocks).generate([request])[0]]


@dataclass
class Rig:
    """One P, one D, one gateway."""

    service: PrefillService
    decode: ScriptedDecode
    gateway: ScriptedGateway
    hub: LoopbackHub
    config: DuomoConfig
    tracing: Tracing
    agent: TransferAgent

    async def is_clean(self) -> None:
        """Everything is back: read from the report, as the router sees it, and from D's agent."""

        def check() -> bool:
            report, slots = self.service.report(), self.decode.agent.counts()
            return (
                report.num_free_blocks + report.num_cached_blocks == report.num_blocks
                and (report.num_queued, report.num_running, report.num_open_handles, report.num_open_spans) == (0, 0, 0, 0)
                and (slots.num_quarantined_slots, slots.num_free_slots, slots.num_open_handles) == (0, slots.num_slots, 0)
            )

        await until(check, "something is still held", 1.5)


def config_for(run_dir: Path, **prefill: object) -> DuomoConfig:
    transfer = prefill.pop("transfer", {})
    units = prefill.pop("units", 4)
    raw = {
        "model": {"path": str(MODEL_DIR), "units": units},
        "prefill": {"num_blocks": 256, "torch_threads": 1, **prefill},
        "kv_transfer": {"transport": "loopback", "slot_bytes": 128 * 1024, **transfer},
        "tracing": {"directory": str(run_dir / "spans")},
        "run_dir": str(run_dir),
    }
    return DuomoConfig.model_validate(raw)


@contextlib.asynccontextmanager
async def rig(run_dir: Path, faults: dict[int, Fault] | None = None, **prefill: object) -> AsyncIterator[Rig]:
    config = config_for(run_dir, **prefill)
    hub = LoopbackHub(ScriptedFaults(faults or {}))
    card = ReplicaCard.of(config, "prefill", "prefill-0", model().config.fingerprint)
    worker = PrefillWorker(model(), WorkerSizes.of(config))
    agent = TransferAgent(card.boot_id, hub.agent("p"), config.kv_transfer, num_send_slots=4)
    tracing = configure(config.tracing, "duomo-prefill", "prefill", "prefill-0")
    service = PrefillService(card, worker, agent, tracing)
    decode = ScriptedDecode(model().config, config, hub.agent("d"))
    await decode.start()
    await service.start()
    gateway = await ScriptedGateway.dial(service.membership.identity.address, model().config, config)
    try:
        yield Rig(service, decode, gateway, hub, config, tracing, agent)
    finally:
        await gateway.close()
        await service.stop()
        await decode.close()
        agent.close()
        tracing.shutdown()


def run(test: Callable[[Path], Coroutine[Any, Any, None]], run_dir: Path) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test(run_dir)

    asyncio.run(bounded())


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
            assert all(sum(layer) == num_tokens * model().config.top_k for layer in done.expert_counts)
            assert len(done.expert_counts) == model().config.num_layers
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


def test_a_groups_push_is_in_flight_while_the_next_group_computes(tmp_path: Path) -> None:
    """A wave of three prompts over four groups, the transport slowed: seen from the spans alone."""

    async def scenario(run_dir: Path) -> None:
        slow = {write: Fault(delay_s=0.005) for write in range(100)}
        async with rig(run_dir, faults=slow) as parts:
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
    assert all(abs(times[1] - starts[0][1]) < 1_000_000 for times in starts), "the three prompts are one wave"
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


STAGES = ("queued", "announced", "granted", "computing", "handing_off")


@pytest.mark.parametrize("stage", STAGES)
def test_a_cancel_at_any_stage_gives_everything_back_and_harms_no_other(tmp_path: Path, stage: str) -> None:
    async def scenario(run_dir: Path) -> None:
        async with rig(run_dir, transfer={"max_bytes_per_s": 3e7}, max_wave_prompts=2, max_wave_tokens=400, num_blocks=80) as parts:
            decode, gateway = parts.decode, parts.gateway
            decode.is_granting = stage not in ("queued", "announced")
            decode.is_draining = stage != "handing_off"
            fillers = {"queued": ("f0", "f1"), "granted": ("f0",)}.get(stage, ())
            for name in fillers:
                gateway.start(name, ids(30 if stage == "queued" else 300, seed=9), decode.address)
            if stage == "queued":
                await decode.inbox.until(lambda: len(decode.inbox.of(WaveAnnounced)) == 2)
            gateway.start("gone", ids(290), decode.address)
            await until(lambda: stage in stages_of(parts, "gone"), f"never {stage}")
            gateway.cancel("gone")
            await until(lambda: not stages_of(parts, "gone"), "the leg lives on", 1.0)
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
            await asyncio.sleep(0.02)
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
            parts.decode.is_granting = stage != "announced"
            parts.decode.is_draining = stage != "handing_off"
            parts.gateway.start("r", ids(300), parts.decode.address)
            await until(lambda: stage in stages_of(parts, "r"), f"never {stage}")
            parts.hub.kill("d")
            await parts.decode.connections[0].close()
            failed = await parts.gateway.failed("r")
            assert failed.retryable and failed.phase == "kv.handoff", failed
            await until(lambda: parts.service.num_live_requests() == 0, "the leg lives on", 1.0)
            report = parts.service.report()
            assert (report.num_free_blocks, report.num_open_handles, report.num_open_spans) == (report.num_blocks, 0, 0)

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
