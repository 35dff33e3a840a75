"""Real prefill and decode services with a scripted gateway, in one process over loopback: one pair, and two by two under random delays."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duomo.config import DuomoConfig
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.telemetry.tracing import configure
from duomo.wire.messages import PeerAddress, RequestFailed, Sampling, StartDecode, StartPrefill
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import FaultPlan, SeededFaults
from services.kv_transfer.membership import ReplicaCard
from services.kv_transfer.transport_loopback import LoopbackHub
from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker, WorkerSizes
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import GREEDY, ScriptedGateway, expected, ids, model, until


@dataclass
class System:
    """Every replica, and one gateway's sockets to each."""

    prefills: list[tuple[PrefillService, ScriptedGateway]]
    decodes: list[tuple[DecodeService, ScriptedGateway]]

    def start(
        self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling, *, p: int, d: int, choices: tuple[int, ...] = (0,)
    ) -> None:
        prefill, to_prefill = self.prefills[p]
        decode, to_decode = self.decodes[d]
        common = {"request_id": request_id, "attempt": 0, "traceparent": "", "remaining_s": 100.0}
        to_prefill.post(
            StartPrefill(**common, prompt_ids=prompt_ids, sampling=sampling, choices=choices, decode=address_of(decode))  # type: ignore[arg-type]  # one dict for both
        )
        to_decode.post(
            StartDecode(**common, prompt_ids=prompt_ids, sampling=sampling, choices=choices, prefill=address_of(prefill))  # type: ignore[arg-type]  # one dict for both
        )

    async def ended(self, request_id: str, *, p: int, d: int) -> None:
        to_prefill, to_decode = self.prefills[p][1], self.decodes[d][1]
        for gateway in (to_prefill, to_decode):
            await gateway.ended(request_id)
            assert not gateway.of(RequestFailed, request_id), gateway.of(RequestFailed, request_id)

    def tokens(self, request_id: str, *, p: int, d: int, choice: int = 0) -> list[int]:
        """P's first token and D's others; each index once."""
        first, rest = self.prefills[p][1].answers[request_id], self.decodes[d][1].answers[request_id]
        assert not set(first.tokens[choice]) & set(rest.tokens[choice]), "a token came twice"
        merged = first.tokens[choice] | rest.tokens[choice]
        assert sorted(merged) == list(range(len(merged))), "a token is missing"
        return [merged[index].token_id for index in sorted(merged)]

    async def at_rest(self) -> None:
        services: list[PrefillService | DecodeService] = [service for service, _ in self.prefills]
        services += [service for service, _ in self.decodes]

        def rests() -> bool:
            reports = [service.report() for service in services]
            return all(
                report.num_free_blocks + report.num_cached_blocks == report.num_blocks
                and report.num_quarantined_slots == report.num_running == report.num_queued == 0
                and report.num_free_slots == report.num_slots
                for report in reports
            )

        try:
            await until(rests, 10.0)
        except TimeoutError as error:
            raise AssertionError(f"not at rest: {[service.report() for service in services]}") from error
        for service, _ in self.decodes:
            service.pool.check_integrity()


def address_of(service: PrefillService | DecodeService) -> PeerAddress:
    identity = service.membership.identity
    return PeerAddress(replica_id=identity.replica_id, boot_id=identity.boot_id, address=identity.address)


@asynccontextmanager
async def system(config: DuomoConfig, num_p: int, num_d: int, faults: FaultPlan | None = None) -> AsyncIterator[System]:
    hub = LoopbackHub(faults)
    tracing = configure(config.tracing, "duomo-test")
    fingerprint = model().config.fingerprint
    async with AsyncExitStack() as stack:
        made = System([], [])
        for number in range(num_d):
            card = ReplicaCard.of(config, "decode", f"d{number}", fingerprint)
            agent = TransferAgent(card.boot_id, hub.agent(card.boot_id), config.kv_transfer, num_send_slots=1)
            stack.callback(agent.close)
            cache = KvCache(kv_spec(model().config, 16), config.decode.num_blocks)
            worker = DecodeWorker(model(), cache, torch_threads=1)
            made.decodes.append((await _serve(stack, DecodeService(card, worker, agent, tracing)), await _gateway(stack, config)))
        for number in range(num_p):
            card = ReplicaCard.of(config, "prefill", f"p{number}", fingerprint)
            agent = TransferAgent(card.boot_id, hub.agent(card.boot_id), config.kv_transfer, num_send_slots=config.prefill.send_slots)
            stack.callback(agent.close)
            service = PrefillService(card, PrefillWorker(model(), WorkerSizes.of(config)), agent, tracing)
            made.prefills.append((await _serve(stack, service), await _gateway(stack, config)))
        for prefill, gateway in made.prefills:
            await gateway.connect(prefill.membership.identity.address)
        for decode, gateway in made.decodes:
            await gateway.connect(decode.membership.identity.address)
        yield made


Service = TypeVar("Service", PrefillService, DecodeService)


async def _serve(stack: AsyncExitStack, service: Service) -> Service:
    await service.start()
    stack.push_async_callback(service.stop)
    return service


async def _gateway(stack: AsyncExitStack, config: DuomoConfig) -> ScriptedGateway:
    gateway = ScriptedGateway(config)
    stack.push_async_callback(gateway.close)
    return gateway


def test_a_pair_serves_prompts_of_odd_sizes(tmp_path: Path) -> None:
    async def go() -> None:
        async with system(configuration(tmp_path), 1, 1) as made:
            sizes = (1, 15, 16, 17, 63, 257)
            for size in sizes:
                made.start(f"r{size}", ids(size, size), GREEDY, p=0, d=0)
            for size in sizes:
                await made.ended(f"r{size}", p=0, d=0)
                assert made.tokens(f"r{size}", p=0, d=0) == expected(ids(size, size))
            await made.at_rest()

    asyncio.run(go())


def test_a_pair_serves_choices_and_single_tokens(tmp_path: Path) -> None:
    async def go() -> None:
        async with system(configuration(tmp_path), 1, 1) as made:
            sampling = Sampling(max_tokens=10, temperature=0.8, seed=5, ignore_eos=True)
            made.start("n", ids(21), sampling, p=0, d=0, choices=(0, 1, 2))
            one = Sampling(max_tokens=1, temperature=0.0)
            made.start("one", ids(40), one, p=0, d=0)
            await made.ended("n", p=0, d=0)
            await made.ended("one", p=0, d=0)
            for choice in range(3):
                assert made.tokens("n", p=0, d=0, choice=choice) == expected(ids(21), sampling, choice)
            assert made.tokens("one", p=0, d=0) == expected(ids(40), one)
            await made.at_rest()

    asyncio.run(go())


@pytest.mark.timeout(400)
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    seed=st.integers(0, 2**31),
    max_delay_ms=st.sampled_from([0, 3, 30]),
    ring_slots=st.sampled_from([1, 2, 5]),
    num_blocks=st.sampled_from([10, 24]),
)
def test_two_by_two_never_stalls(seed: int, max_delay_ms: int, ring_slots: int, num_blocks: int) -> None:
    """Small pools, tiny rings, random delays and duplicates: every request ends with the right tokens, and everything comes back."""
    folder = Path(tempfile.mkdtemp(prefix="duomo-pair-"))
    draw = random.Random(seed)
    changes: dict[str, dict[str, object]] = {
        "decode": {"num_blocks": num_blocks, "watermark_blocks": 1, "ring_slots": ring_slots},
        "prefill": {"num_blocks": 16, "send_slots": 2, "grant_timeout_s": 60.0},
        "kv_transfer": {"write_timeout_s": 20.0},
    }
    faults = SeededFaults(seed=seed, max_delay_s=max_delay_ms / 1000, chance_duplicate=0.1, chance_announce_early=0.2)

    async def go() -> None:
        async with system(configuration(folder, changes), 2, 2, faults) as made:
            sampling = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)
            requests = []
            for number in range(12):
                p, d, size = draw.randrange(2), draw.randrange(2), draw.choice([1, 16, 33, 60])
                made.start(f"r{number}", ids(size, size), sampling, p=p, d=d)
                requests.append((f"r{number}", p, d, size))
                await asyncio.sleep(draw.random() * 0.02)
            for request_id, p, d, size in requests:
                await made.ended(request_id, p=p, d=d)
                assert made.tokens(request_id, p=p, d=d) == expected(ids(size, size), sampling)
            await made.at_rest()

    try:
        asyncio.run(go())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
