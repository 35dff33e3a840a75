"""A prefill and a decode replica of a GPU, each with its own engine: KV crosses rings of either memory, and tokens are one engine's.

Interpreted, over loopback with faults and over NIXL; on a card two engines in one process, and graphs. Two processes are `duomo serve
--layout split` (docs/operations.md).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.config import DuomoConfig, KvDtype, TransferSection
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.gpu_start import planned
from duomo.engine.memory_plan import DeviceBytes, EnginePart, MemoryLimits
from duomo.engine.startup import Startup
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.values import Sampling
from services.decode.gpu_worker import GpuDecodeWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.device_memory import DeviceRegion
from services.kv_transfer.faults import Fault, FaultPlan, ScriptedFaults
from services.kv_transfer.memory import Region
from services.kv_transfer.transport import Transport
from services.prefill.gpu_worker import GpuPrefillWorker
from services.prefill.worker import WorkerSizes
from tests.engine.gpu_tiny import TINY, WIDE
from tests.interpreter import prepare
from tests.services.decode.rig import configuration
from tests.services.gpu_rig import Asked, alone, judge, known, prompt, serve
from tests.services.pair_rig import System, WorkerMakers, system

prepare()

INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
GREEDY = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
DRAWS = Sampling(max_tokens=3, temperature=0.9, seed=5, ignore_eos=True)
Scenario = Callable[[System], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class Pair:
    """Two engines of one service each, and one of both for what is right."""

    prefill: GpuEngine
    decode: GpuEngine
    both: GpuEngine


def interpreted(part: EnginePart) -> GpuEngine:
    limits = MemoryLimits(max_batch=4, max_wave_tokens=64, max_model_tokens=64, block_tokens=16, dtype_bytes=4, part=part)
    load = partial(random_gpu_weights, known(TINY), device=torch.device("cpu"), dtype=torch.float32, std=0.125)
    room = DeviceBytes(total=17_250_000, free=17_250_000)
    engine = start_engine(
        EngineStart(config=known(TINY), load=load, limits=limits, device=torch.device("cpu"), memory=room, is_shared=True), Startup()
    )
    engine.compilations.close()
    return engine


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair(prefill=interpreted("prefill"), decode=interpreted("decode"), both=interpreted("both"))


def told(folder: Path, pair: Pair, sections: dict[str, dict[str, object]] | None = None) -> DuomoConfig:
    """With the blocks that each engine has planned. Interpreted steps take long."""
    sections = sections or {}
    sections.setdefault("model", {}).update(units=2)
    sections.setdefault("prefill", {}).update(grant_timeout_s=60.0)
    sections.setdefault("kv_transfer", {}).setdefault("write_timeout_s", 60.0)  # or what is slow to land is taken for lost, and pulled
    sections.setdefault("decode", {}).setdefault("max_batch", 4)
    config = planned(configuration(folder, sections), pair.decode.plan, "decode")
    return planned(config, pair.prefill.plan, "prefill")


def play(pair: Pair, config: DuomoConfig, scenario: Scenario, faults: FaultPlan | None = None) -> None:
    makers = WorkerMakers(
        prefill=lambda config: GpuPrefillWorker(pair.prefill, WorkerSizes.of(config), config.delays),
        decode=lambda config: GpuDecodeWorker(pair.decode, kv_dtype=config.kv_transfer.kv_dtype),
    )

    def agent(boot_id: str, transport: Transport, section: TransferSection, num_send_slots: int) -> TransferAgent:
        of_device = partial(DeviceRegion, device=pair.decode.cache.device)
        allocate = of_device if section.memory == "device" else Region
        return TransferAgent(boot_id, transport, section, num_send_slots=num_send_slots, allocate=allocate)

    # an engine that is ready also counts what the next one of its process compiles while that one starts
    before = [engine.compilations.num_after_ready for engine in (pair.prefill, pair.decode)]

    async def go() -> None:
        async with asyncio.timeout(100), system(config, 1, 1, faults, makers, agent) as made:
            await scenario(made)
            await made.at_rest()
            served = zip((made.prefills[0][0], made.decodes[0][0]), (pair.prefill, pair.decode), before, strict=True)
            for service, engine, num_compiled in served:
                report = service.report()
                assert (report.num_blocks, report.block_tokens) == (engine.plan.num_blocks, engine.plan.block_tokens)
                assert report.counters["kernel_compilations_after_ready"] == num_compiled
                service.check_health()

    asyncio.run(go())


@INTERPRETED
@pytest.mark.parametrize("memory", ["device", "host"])
def test_kv_crosses_and_tokens_are_one_engines(pair: Pair, tmp_path: Path, memory: str) -> None:
    """Prompts of part of a block and of several; two choices; a second turn, of which decode has the beginning."""
    asked = [Asked(prompt(5, 1, 97), GREEDY), Asked(prompt(21, 2, 97), DRAWS, choices=(0, 1))]
    turn = Asked((*asked[1].prompt_ids, 7, 8, 9), GREEDY)
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(made: System) -> None:
        found.update(await serve(made, asked))
        decode = made.decodes[0][0]
        block_bytes = pair.decode.cache.spec.block_bytes * TINY.num_layers
        assert decode.report().counters["landed_bytes"] == (1 + 2) * block_bytes
        made.start("turn", turn.prompt_ids, GREEDY, p=0, d=0)
        await made.ended("turn", p=0, d=0)
        found[2, 0] = made.tokens("turn", p=0, d=0)
        assert decode.report().counters["landed_bytes"] == (3 + 1) * block_bytes, "one of its two blocks was known"

    play(pair, told(tmp_path, pair, {"kv_transfer": {"memory": memory}}), scenario)
    judge(pair.both, [*asked, turn], found)


@INTERPRETED
def test_kv_crosses_over_nixl(pair: Pair, tmp_path: Path) -> None:
    one = Asked(prompt(33, 3, 97), GREEDY)
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(made: System) -> None:
        found.update(await serve(made, [one]))
        assert made.decodes[0][0].report().transport.startswith("nixl")

    play(pair, told(tmp_path, pair, {"kv_transfer": {"transport": "nixl", "ucx_net_devices": "lo"}}), scenario)
    judge(pair.both, [one], found)


@INTERPRETED
@pytest.mark.parametrize("memory", ["device", "host"])
def test_kv_crosses_in_fp8_and_tokens_are_those_of_rounded_kv(pair: Pair, tmp_path: Path, memory: str) -> None:
    """One of the messages has its exponents spoilt on the way."""
    asked = [Asked(prompt(5, 1, 97), DRAWS), Asked(prompt(40, 2, 97), DRAWS, choices=(0, 1))]
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(made: System) -> None:
        found.update(await serve(made, asked))
        report, spec = made.decodes[0][0].report(), pair.decode.cache.spec
        rows = (1 + 3) * TINY.num_layers * 2 * spec.num_kv_heads * spec.block_tokens
        assert report.counters["landed_bytes"] == rows * (spec.head_dim + 1)
        assert report.counters["messages_corrupt"] == 1 == made.prefills[0][0].report().counters["kv_pulls"]

    block_bytes = 2 * pair.decode.cache.spec.num_kv_heads * 16 * (pair.decode.cache.spec.head_dim + 1)
    faults = ScriptedFaults({1: Fault(corrupt_byte=block_bytes - 1)})
    play(pair, told(tmp_path, pair, {"kv_transfer": {"memory": memory, "kv_dtype": "fp8_e4m3"}}), scenario, faults)
    for (number, choice), mine in found.items():
        assert mine == alone(pair.both, asked[number], choice, len(mine), "fp8_e4m3"), (number, choice)


@INTERPRETED
def test_a_corrupted_message_is_pulled_again(pair: Pair, tmp_path: Path) -> None:
    one = Asked(prompt(17, 4, 97), GREEDY)
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(made: System) -> None:
        found.update(await serve(made, [one]))
        assert made.decodes[0][0].report().counters["messages_corrupt"] == 1
        assert made.prefills[0][0].report().counters["kv_pulls"] == 1

    play(pair, told(tmp_path, pair), scenario, ScriptedFaults({1: Fault(corrupt_byte=100)}))
    judge(pair.both, [one], found)


@INTERPRETED
def test_a_request_cancelled_while_its_kv_lands_gives_all_back(pair: Pair, tmp_path: Path) -> None:
    """Slow messages, so that it ends in between; the next one takes its blocks, and is right."""
    one = Asked(prompt(18, 6, 97), GREEDY)
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(made: System) -> None:
        made.start("gone", prompt(34, 5, 97), GREEDY, p=0, d=0)
        async with asyncio.timeout(30):
            while not made.decodes[0][0].report().counters.get("messages_landed"):
                await asyncio.sleep(0.002)
        for gateway in (made.prefills[0][1], made.decodes[0][1]):
            gateway.cancel("gone")
        found.update(await serve(made, [one]))

    play(pair, told(tmp_path, pair, {"delays": {"kv_handoff_s": 0.05}}), scenario)
    judge(pair.both, [one], found)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are CUDA's")
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("transport", "memory", "kv_dtype"),
    [("loopback", "host", "model"), ("nixl", "host", "model"), ("nixl", "device", "model"), ("nixl", "device", "fp8_e4m3")],
)
def test_two_engines_on_a_card_answer_as_one(tmp_path: Path, transport: str, memory: str, kv_dtype: KvDtype) -> None:
    """Captured graphs, 32 requests at a time, deterministic: the tokens of one engine that is both, and no hash that differs."""
    if transport == "nixl":
        pytest.importorskip("nixl_cu13", reason="KV moves by NIXL")
    device = torch.device("cuda", 0)

    def started(part: EnginePart) -> GpuEngine:
        limits = MemoryLimits(max_batch=32, max_wave_tokens=2048, max_model_tokens=512, block_tokens=64, part=part)
        load = partial(random_gpu_weights, known(WIDE), device=device, std=WIDE.hidden**-0.5)
        room = DeviceBytes(total=4_000_000_000, free=4_000_000_000)
        start = EngineStart(config=known(WIDE), load=load, limits=limits, device=device, is_deterministic=True, memory=room, is_shared=True)
        return start_engine(replace(start, kv_dtype=kv_dtype), Startup())

    both, prefill, decode = started("both"), started("prefill"), started("decode")
    pair = Pair(prefill=prefill, decode=decode, both=both)
    lengths = [1, 63, 64, 65, 128, 200, 300, 330]
    sampled = [msgspec.structs.replace(GREEDY, max_tokens=40), msgspec.structs.replace(DRAWS, max_tokens=33)]
    asked = [Asked(prompt(lengths[number % 8], number, 1000), sampled[number % 2]) for number in range(32)]
    found: dict[tuple[int, int], list[int]] = {}

    async def scenario(made: System) -> None:
        found.update(await serve(made, asked))
        counters = made.decodes[0][0].report().counters
        assert counters["landed_bytes"] > 0 and not counters.get("messages_corrupt")

    sections: dict[str, dict[str, object]] = {
        "kv_transfer": {"transport": transport, "memory": memory, "ucx_net_devices": "lo", "slot_bytes": 1 << 20, "kv_dtype": kv_dtype},
        "decode": {"max_batch": 32},
        "model": {"max_model_tokens": 512},
    }
    try:
        play(pair, told(tmp_path, pair, sections), scenario)
        for (number, choice), mine in found.items():
            assert mine == alone(both, asked[number], choice, len(mine), kv_dtype), number
    finally:
        for engine in (both, prefill, decode):
            engine.compilations.close()
