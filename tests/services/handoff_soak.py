"""Thousands of handoffs between real prefill and decode services under drawn faults, cancels, stops and broken sockets, and their ledger.

The services, sockets, agents and engine are the real ones; the model is small and random, so that moving KV is most of the work. What
is drawn depends on the seed alone, what meets what on the machine. No speed is judged: a limit says that something never ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from duomo.config import DuomoConfig, TransferSection
from duomo.engine.kv_cache import KvCache, kv_spec
from duomo.engine.monolith import GenerateRequest, generate
from duomo.models.qwen3_moe import Model, load_model
from duomo.wire.messages import Cancel, Message, Preempted, RequestFailed, RequestFinished, StartDecode, StartPrefill, TokensEmitted
from duomo.wire.values import Sampling
from services.decode.service import DecodeService
from services.decode.worker import DecodeWorker
from services.kv_transfer.agent import TransferAgent
from services.kv_transfer.faults import FaultPlan
from services.kv_transfer.transport import Transport
from services.prefill.service import PrefillService
from services.prefill.worker import WorkerSizes
from tests.services.decode.scripted_peers import MODEL_DIR, Peer, until
from tests.services.held import held_by_decode, held_by_prefill
from tests.services.pair_rig import System, WorkerMakers, address_of, system
from tests.services.witnesses import FaultyTransport, Witness, WitnessedAgent, WitnessedWorker

NUM_PROMPTS = 24
# Long beside what a busy machine takes; green runs wait for none of them.
REMAINING_S = 90.0
END_S = 120.0  # by then every request has ended, one way or the other
REST_S = 60.0  # by then all is back
# What a request may end with here: each has a cause that was drawn.
CAUSES = {
    "kv_corrupt": "spoilt twice",
    "transfer_timeout": "lost twice, or its writer stopped",
    "write_timeout": "its reader stopped",
    "peer_gone": "its socket was broken",
    "transfer_failed": "its reader was replaced",
    "deadline_exceeded": "its time was short",
    "stale_handle": "its ring was replaced",
    "no_grant": "its decode replica stood still",
    "preempted": "decode ran out of blocks",
}


@functools.cache
def small_model(folder: Path) -> Model:
    """Four layers of random weights, with KV as wide as the embedded model's."""
    torch.set_num_threads(1)
    config = json.loads((MODEL_DIR / "config.json").read_text())
    del config["quantization_config"]
    hidden, expert_hidden, vocab, experts = 32, 16, 96, 4
    config |= {"hidden_size": hidden, "num_attention_heads": 2, "num_hidden_layers": 4, "num_local_experts": experts}
    config |= {"num_experts_per_tok": 1, "moe_intermediate_size": expert_hidden, "vocab_size": vocab, "tie_word_embeddings": False}
    drawn = torch.Generator().manual_seed(1)

    def weights(*shape: int) -> torch.Tensor:
        spread: float = shape[-1] ** -0.5
        return torch.randn(*shape, generator=drawn) * spread

    tensors = {"model.embed_tokens.weight": weights(vocab, hidden), "lm_head.weight": weights(vocab, hidden) * 8}
    tensors["model.norm.weight"] = torch.ones(hidden)
    for layer in range(4):
        at = f"model.layers.{layer}."
        tensors |= {f"{at}{norm}_layernorm.weight": torch.ones(hidden) for norm in ("input", "post_attention")}
        tensors |= {f"{at}self_attn.{side}_proj.weight": weights(128, hidden) for side in "qkv"}
        tensors |= {f"{at}self_attn.{side}_norm.weight": torch.ones(64) for side in "qk"}
        tensors |= {f"{at}self_attn.o_proj.weight": weights(hidden, 128) * 4, f"{at}mlp.gate.weight": weights(experts, hidden)}
        for expert in range(experts):
            tensors |= {f"{at}mlp.experts.{expert}.{side}_proj.weight": weights(expert_hidden, hidden) for side in ("gate", "up")}
            tensors[f"{at}mlp.experts.{expert}.down_proj.weight"] = weights(hidden, expert_hidden)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return load_model(folder)


@dataclass(eq=False)
class Flight:
    """One request of the soak. outcome: ok, cancelled, or a failure's code."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    choices: tuple[int, ...]
    tokens: dict[tuple[int, int], int] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    failure: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def right_tokens(self, model: Model) -> bool:
        for choice in self.choices:
            right = expected(model, self.prompt_ids, self.sampling, choice)
            if [self.tokens.get((choice, index)) for index in range(len(right))] != right:
                return False
        return True


@functools.cache
def expected(model: Model, prompt_ids: tuple[int, ...], sampling: Sampling, choice: int) -> list[int]:
    """What the engine generates in one process."""
    return [token.token_id for token in generate(model, [GenerateRequest(prompt_ids=prompt_ids, sampling=sampling, choice=choice)])[0]]


class SoakGateway(Peer):
    """A gateway's socket to one replica. Tells each flight what came for it, and keeps nothing."""

    def __init__(self, config: DuomoConfig, flights: dict[str, Flight], wrong: list[str]) -> None:
        super().__init__("gateway", config)
        self._flights = flights
        self._wrong = wrong

    def take(self, message: Message) -> None:
        self.inbox.clear()
        assert self.connection is not None
        match message:
            case TokensEmitted():
                for token in message.tokens:
                    if (flight := self._flights.get(token.request_id)) is not None:
                        if (token.choice, token.index) in flight.tokens:
                            self._wrong.append(f"{token.request_id}: token {token.index} came twice")
                        flight.tokens[token.choice, token.index] = token.token_id
            case RequestFinished() | RequestFailed() | Preempted():
                if (flight := self._flights.get(message.request_id)) is not None:
                    flight.over.add(self.connection.peer.role)
                    if isinstance(message, RequestFailed):
                        flight.failure = flight.failure or message.code
                    elif isinstance(message, Preempted):
                        flight.failure = flight.failure or "preempted"
                    flight.changed.set()


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How often what happens, and for how long. Chances are of a request."""

    num_handoffs: int
    seed: int
    num_at_once: int = 16
    chance_cancel: float = 0.25
    chance_short: float = 0.02  # a deadline of milliseconds
    chance_break: float = 0.002  # a socket between prefill and decode
    chance_stop: float = 0.004  # of a decode process' memory: what is written waits
    longest_stop_s: float = 0.3


class Soak:
    """One run over a system of two prefill and two decode replicas."""

    def __init__(self, made: System, model: Model, witness: Witness, drawn: Drawn) -> None:
        self._made = made
        self._model = model
        self._witness = witness
        self._drawn = drawn
        self._draw = random.Random(drawn.seed)
        self._flights: dict[str, Flight] = {}
        self._chaos: set[asyncio.Task[None]] = set()
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._to_prefill = [SoakGateway(gateway.config, self._flights, self.wrong) for _, gateway in made.prefills]
        self._to_decode = [SoakGateway(gateway.config, self._flights, self.wrong) for _, gateway in made.decodes]
        self.events: Counter[str] = Counter()

    async def run(self) -> None:
        """Until so many handles were offered; everything that was begun has ended."""
        for gateway, service in zip((*self._to_prefill, *self._to_decode), self._services(), strict=True):
            await gateway.connect(service.membership.identity.address)
        ahead = asyncio.create_task(self._connect_ahead())
        try:
            await asyncio.gather(*(self._requests(lane) for lane in range(self._drawn.num_at_once)))
            await asyncio.gather(*self._chaos)
            await self._rest()
        finally:
            ahead.cancel()
            for gateway in (*self._to_prefill, *self._to_decode):
                await gateway.close()

    async def _connect_ahead(self) -> None:
        """As a replica with a directory does: a broken socket is mended without a request that wants it."""
        while True:
            for prefill, _ in self._made.prefills:
                for decode, _ in self._made.decodes:
                    prefill.prepare(address_of(decode))
            await asyncio.sleep(0.2)

    async def _requests(self, lane: int) -> None:
        number = 0
        while len(self._witness.handles) < self._drawn.num_handoffs:
            number += 1
            await self._request(f"{lane}.{number}")
            if self._draw.random() < self._drawn.chance_break:
                self._break_socket()
            if self._draw.random() < self._drawn.chance_stop and self._made.hub is not None:
                task = asyncio.create_task(self._stop_for(self._draw.random() * self._drawn.longest_stop_s))
                self._chaos.add(task)
                task.add_done_callback(self._chaos.discard)

    def _flight(self, request_id: str) -> Flight:
        draw = self._draw
        kind = draw.randrange(NUM_PROMPTS)
        size = (1, 15, 16, 17, 33, 48, 63, 64, 90, 128, 150, 170)[kind % 12]
        max_tokens = draw.randint(1, 3) if draw.random() < 0.95 else 40  # long ones run pools out of blocks
        sampling = Sampling(max_tokens=max_tokens, temperature=0.8 if kind % 2 else 0.0, seed=7, ignore_eos=True)
        prompt_ids = tuple((kind * 31 + place * (kind + 3)) % 90 + 3 for place in range(size))
        return Flight(request_id, prompt_ids, sampling, (0, 1) if draw.random() < 0.15 else (0,))

    async def _request(self, request_id: str) -> None:
        draw, drawn = self._draw, self._drawn
        flight = self._flights[request_id] = self._flight(request_id)
        p, d = draw.randrange(len(self._to_prefill)), draw.randrange(len(self._to_decode))
        is_short = draw.random() < drawn.chance_short
        remaining_s = draw.uniform(0.001, 0.05) if is_short else REMAINING_S
        salt = request_id if draw.random() < 0.7 else "shared"
        await self._start(flight, p, d, remaining_s, salt)
        cancel_s = draw.expovariate(1 / 0.03) if draw.random() < drawn.chance_cancel else END_S
        try:
            async with asyncio.timeout(cancel_s):
                while not flight.failure and len(flight.over) < 2:
                    flight.changed.clear()
                    await flight.changed.wait()
        except TimeoutError:
            if cancel_s == END_S:
                self.wrong.append(f"{request_id} did not end: {flight.over}, {str(self.held())[:2000]}")
        if flight.failure or len(flight.over) < 2:
            await self._cancel(request_id, p, d)
        self._note(flight, was_short=is_short)
        del self._flights[request_id]

    def _note(self, flight: Flight, *, was_short: bool) -> None:
        if flight.failure:
            self.outcomes[flight.failure] += 1
            if flight.failure not in CAUSES or (flight.failure == "deadline_exceeded" and not was_short):
                self.wrong.append(f"{flight.request_id} failed by {flight.failure}")
        elif len(flight.over) < 2:
            self.outcomes["cancelled"] += 1
        else:
            self.outcomes["ok"] += 1
            if not flight.right_tokens(self._model):
                self.wrong.append(f"{flight.request_id} was answered wrong: {flight.tokens}")

    async def _start(self, flight: Flight, p: int, d: int, remaining_s: float, salt: str) -> None:
        common = {"request_id": flight.request_id, "attempt": 0, "traceparent": "", "remaining_s": remaining_s, "cache_salt": salt}
        common |= {"prompt_ids": flight.prompt_ids, "sampling": flight.sampling, "choices": flight.choices}
        prefill, decode = self._made.prefills[p][0], self._made.decodes[d][0]
        to_prefill, to_decode = self._to_prefill[p].post, self._to_decode[d].post
        start_prefill = StartPrefill(**common, decode=address_of(decode))  # type: ignore[arg-type]  # one dict for both
        start_decode = StartDecode(**common, prefill=address_of(prefill))  # type: ignore[arg-type]  # one dict for both
        posts: list[tuple[Callable[[Message], None], Message]] = [(to_prefill, start_prefill), (to_decode, start_decode)]
        for post, start in self._draw.sample(posts, 2):
            post(start)
            await self._pause()

    async def _cancel(self, request_id: str, p: int, d: int) -> None:
        for gateway in self._draw.sample([self._to_prefill[p], self._to_decode[d]], 2):
            gateway.post(Cancel(request_id=request_id, attempt=0, traceparent="", remaining_s=0.0, reason="soak"))
            await self._pause()

    async def _pause(self) -> None:
        """One leg hears of something later than the other."""
        if self._draw.random() < 0.3:
            await asyncio.sleep(self._draw.random() * 0.02)

    def _break_socket(self) -> None:
        decode, _ = self._draw.choice(self._made.decodes)
        connections = decode._producers.connections()
        if connections:
            self.events["sockets broken"] += 1
            self._draw.choice(connections).end("broken", "the soak broke it")

    async def _stop_for(self, stop_s: float) -> None:
        hub = self._made.hub
        assert hub is not None
        names = [name for name in hub._agents if any(name.startswith(decode.card.boot_id) for decode, _ in self._made.decodes)]
        if not names:
            return  # their memory is not on the hub
        name = self._draw.choice(names)
        self.events["memories stopped"] += 1
        hub.stop(name)
        await asyncio.sleep(stop_s)
        hub.resume(name)

    async def _rest(self) -> None:
        with contextlib.suppress(TimeoutError):
            await until(lambda: not self.held(), REST_S)
        held = self.held()
        assert not held, f"held by nobody: {held}"
        await self._made.at_rest()

    def held(self) -> dict[str, object]:
        """What is not back, on either side; empty when all is."""
        held: dict[str, object] = {}
        for place, (prefill, _) in enumerate(self._made.prefills):
            held |= {f"p{place} {name}": what for name, what in held_by_prefill(prefill).items() if what}
        for place, (decode, _) in enumerate(self._made.decodes):
            held |= {f"d{place} {name}": what for name, what in held_by_decode(decode).items() if what}
        if self._witness.num_posted != self._witness.num_terminal:
            held["writes that did not end"] = self._witness.num_posted - self._witness.num_terminal
        return held

    def _services(self) -> list[PrefillService | DecodeService]:
        return [*(service for service, _ in self._made.prefills), *(service for service, _ in self._made.decodes)]

    def judge(self) -> None:
        """After a run: what was seen is what may be."""
        seen, fates = self._witness, self._witness.corruptions()
        assert not seen.found, seen.found[:10]
        assert not self.wrong, self.wrong[:10]
        assert not fates["accepted"], f"messages taken for right as they were spoilt: {fates}"
        assert fates["by_hash"], "nothing was spoilt: the run shows nothing"
        unaccounted = {h for h in seen.aborted - seen.fenced - seen.orphaned if not seen.is_complete(h)}
        assert not unaccounted, f"handles that were given up, and neither fenced nor orphaned: {sorted(unaccounted)[:10]}"
        reports = [decode.report().counters for decode, _ in self._made.decodes]
        counted = sum(counters.get("messages_corrupt", 0) for counters in reports)
        assert counted == sum(seen.refused.values()) == sum(counters.get("kv_mismatches", 0) for counters in reports)

    def ledger(self) -> dict[str, object]:
        """What the run consisted of."""
        seen = self._witness
        counters: Counter[str] = Counter()
        for service in self._services():
            counters += Counter(service.report().counters)
        return {
            "handoffs": len(seen.handles),
            "outcomes": dict(self.outcomes),
            "events": dict(self.events),
            "writes": seen.num_posted,
            "messages refused": sum(seen.refused.values()),
            "spoilt messages": dict(seen.corruptions()),
            "handles aborted": len(seen.aborted),
            "fenced of them": len(seen.aborted & seen.fenced),
            "counters": dict(sorted(counters.items())),
        }


@asynccontextmanager
async def soaked(config: DuomoConfig, folder: Path, drawn: Drawn, above: FaultPlan, hub: FaultPlan | None = None) -> AsyncIterator[Soak]:
    """A soak over two by two replicas, before its run. above: what goes wrong over any transport; hub: what only loopback can do."""
    model, witness = small_model(folder), Witness()

    def agent_of(boot_id: str, transport: Transport, section: TransferSection, num_send_slots: int) -> TransferAgent:
        return WitnessedAgent(witness, boot_id, FaultyTransport(transport, witness, above), section, num_send_slots)

    def prefill(config: DuomoConfig) -> WitnessedWorker:
        worker = WitnessedWorker(model, WorkerSizes.of(config))
        worker.witness = witness
        return worker

    def decode(config: DuomoConfig) -> DecodeWorker:
        return DecodeWorker(model, KvCache(kv_spec(model.config, 16), config.decode.num_blocks), torch_threads=1)

    async with system(config, 2, 2, hub, WorkerMakers(prefill=prefill, decode=decode), agent_of) as made:
        started_s = time.monotonic()
        soak = Soak(made, model, witness, drawn)
        yield soak
        soak.events["seconds"] = round(time.monotonic() - started_s)
