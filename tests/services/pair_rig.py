"""Real prefill and decode services with a scripted gateway, in one test process: over loopback in any number, or as one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from duomo.config import DuomoConfig, TransferSection
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.telemetry.tracing import configure
from duomo.wire.messages import RequestFailed, StartDecode, StartPrefill
from duomo.wire.values import PeerAddress, Sampling
from services.colocated import Engine, EngineMeans, Workers, engine_of, workers_of
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker, StepWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import FaultPlan
from services.kv_transfer.membership import ReplicaCard
from services.kv_transfer.step_thread import StepThread
from services.kv_transfer.transport import Transport
from services.kv_transfer.transport_loopback import LoopbackHub
from services.kv_transfer.transport_nixl import NixlTransport
from services.prefill.service import PrefillService
from services.prefill.worker import PrefillWorker, WaveWorker, WorkerSizes
from tests.services.decode.scripted_gateway import ScriptedGateway
from tests.services.decode.scripted_peers import model, until


@dataclass
class System:
    """Every replica, and one gateway's sockets to each. hub: what they move KV by over loopback."""

    prefills: list[tuple[PrefillService, ScriptedGateway]]
    decodes: list[tuple[DecodeService, ScriptedGateway]]
    hub: LoopbackHub | None = None

    def start(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        *,
        p: int,
        d: int,
        choices: tuple[int, ...] = (0,),
        salt: str = "",
    ) -> None:
        prefill, to_prefill = self.prefills[p]
        decode, to_decode = self.decodes[d]
        common = {"request_id": request_id, "attempt": 0, "traceparent": "", "remaining_s": 100.0, "cache_salt": salt}
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
            await until(rests, 60.0)
        except TimeoutError as error:
            raise AssertionError(f"not at rest: {[service.report() for service in services]}") from error
        for service, _ in self.decodes:
            service.pool.check_integrity()


def address_of(service: PrefillService | DecodeService) -> PeerAddress:
    identity = service.membership.identity
    return PeerAddress(replica_id=identity.replica_id, boot_id=identity.boot_id, address=identity.address)


@dataclass(frozen=True)
class WorkerMakers:
    """What computes in each prefill and decode replica."""

    prefill: Callable[[DuomoConfig], WaveWorker]
    decode: Callable[[DuomoConfig], StepWorker]


def _of_cpu() -> WorkerMakers:
    """The embedded model on this CPU."""

    def decode(config: DuomoConfig) -> StepWorker:
        cache = KvCache(kv_spec(model().config, 16), config.decode.num_blocks)
        return DecodeWorker(model(), cache, torch_threads=1, kv_dtype=config.kv_transfer.kv_dtype)

    return WorkerMakers(prefill=lambda config: PrefillWorker(model(), WorkerSizes.of(config)), decode=decode)


MakeAgent = Callable[[str, Transport, TransferSection, int], TransferAgent]  # boot id, transport, section, send slots


def _agent(boot_id: str, transport: Transport, section: TransferSection, num_send_slots: int) -> TransferAgent:
    return TransferAgent(boot_id, transport, section, num_send_slots=num_send_slots)


@asynccontextmanager
async def system(
    config: DuomoConfig,
    num_p: int,
    num_d: int,
    faults: FaultPlan | None = None,
    makers: WorkerMakers | None = None,
    make_agent: MakeAgent = _agent,
) -> AsyncIterator[System]:
    """KV goes by config.kv_transfer.transport."""
    makers = makers or _of_cpu()
    hub = LoopbackHub(faults)

    def transport(boot_id: str) -> Transport:
        return NixlTransport(boot_id, config.kv_transfer) if config.kv_transfer.transport == "nixl" else hub.agent(boot_id)

    tracing = configure(config.tracing, "duomo-test")
    fingerprint = model().config.fingerprint
    async with AsyncExitStack() as stack:
        made = System([], [], hub)
        for number in range(num_d):
            card = ReplicaCard.of(config, "decode", f"d{number}", fingerprint)
            agent = make_agent(card.boot_id, transport(card.boot_id), config.kv_transfer, 1)
            stack.callback(agent.close)
            decoding = DecodeService(card, makers.decode(config), agent, tracing)
            made.decodes.append((await _serve(stack, decoding), await _gateway(stack, config)))
        for number in range(num_p):
            card = ReplicaCard.of(config, "prefill", f"p{number}", fingerprint)
            agent = make_agent(card.boot_id, transport(card.boot_id), config.kv_transfer, config.prefill.send_slots)
            stack.callback(agent.close)
            service = PrefillService(card, makers.prefill(config), agent, tracing)
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


@asynccontextmanager
async def colocated(config: DuomoConfig, workers: Workers | None = None) -> AsyncIterator[tuple[Engine, System]]:
    """Both services of one process, with a gateway's socket to each. workers: the embedded model's on this CPU where none are given."""
    spans = configure(config.tracing, "duomo-test")
    means = EngineMeans(thread=StepThread("engine-step"), prefill_spans=spans, decode_spans=spans)
    engine = engine_of(workers or workers_of(model(), config), "engine-0", means)
    async with AsyncExitStack() as stack:
        stack.callback(means.thread.close)
        stack.push_async_callback(engine.stop)
        await engine.start()
        made = System([(engine.prefill, await _gateway(stack, config))], [(engine.decode, await _gateway(stack, config))])
        await made.prefills[0][1].connect(engine.prefill.membership.identity.address)
        await made.decodes[0][1].connect(engine.decode.membership.identity.address)
        yield engine, made
