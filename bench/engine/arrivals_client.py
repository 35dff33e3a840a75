"""Owns the client of a load: speaks to prefill and decode as a gateway does, and notes when tokens come. Knows no engine and no torch.

    python -m bench.engine.arrivals_client          # started by arrivals_run.py, from whose process it takes no time

Reads one line a load from stdin, the path of a plan and the path for the answers, and writes "done" when the answers are there. It ends
with its stdin. Times are those at which bytes were read off the socket.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.engine.arrivals_cases import Answer, Arrival, Kind
from duomo.config import WireSection
from duomo.errors import PeerError
from duomo.wire.connection import Connection, Identity, connect, new_boot_id
from duomo.wire.messages import Message, Preempted, Refused, RequestFailed, RequestFinished, StartDecode, StartPrefill, TokensEmitted
from duomo.wire.values import PeerAddress, Sampling

FIRST_TOKEN_ID = 3  # below are special ones


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientPlan:
    """What a client plays: warm prompts and `alone` one after the other, then the load. Prompts are drawn from trace_name.

    prefill, decode: where the services listen. arrivals, backlog_tokens, num_backlog: see arrivals_cases.py. limit_s: of one request.
    """

    prefill: PeerAddress
    decode: PeerAddress
    fingerprint: str
    secret: str
    vocab: int
    trace_name: str
    warm: tuple[Arrival, ...]
    alone: tuple[Arrival, ...]
    arrivals: tuple[Arrival, ...]
    load_s: float
    limit_s: float
    is_traced: bool = False
    backlog_tokens: int = 0
    num_backlog: int = 0

    def as_json(self) -> dict[str, Any]:
        addresses = {
            name: {"replica_id": peer.replica_id, "boot_id": peer.boot_id, "address": peer.address}
            for name, peer in (("prefill", self.prefill), ("decode", self.decode))
        }
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in addresses}
        lists = {name: [asdict(one) for one in plain[name]] for name in ("warm", "alone", "arrivals")}
        return plain | lists | addresses


def plan_from_json(row: dict[str, Any]) -> ClientPlan:
    """The inverse of as_json."""
    addresses = {name: PeerAddress(**row[name]) for name in ("prefill", "decode")}
    lists = {name: tuple(Arrival(**one) for one in row[name]) for name in ("warm", "alone", "arrivals")}
    return ClientPlan(**(row | addresses | lists))


@dataclass(slots=True)
class _Flight:
    """One request under way. It is over when both legs have said so, or one has failed."""

    token_s: list[float] = field(default_factory=list)
    failure: str = ""
    legs_left: int = 2
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def failed(self, why: str) -> None:
        self.failure = self.failure or why
        self.over.set()


class Client:
    """One load. open() once, close() once."""

    def __init__(self, plan: ClientPlan) -> None:
        self.plan = plan
        self.answers: list[Answer] = []
        self._flights: dict[str, _Flight] = {}
        self._links: list[Connection] = []
        self._readers: list[asyncio.Task[None]] = []
        self._began_s = 0.0
        self._num_sent = 0

    async def open(self) -> None:
        boot_id = new_boot_id()
        plan = self.plan
        identity = Identity(
            replica_id=f"bench-{boot_id[:4]}", boot_id=boot_id, role="gateway", model_fingerprint=plan.fingerprint, secret=plan.secret
        )
        for peer in (plan.prefill, plan.decode):
            link = await connect(peer.address, identity, WireSection())
            self._links.append(link)
            self._readers.append(asyncio.create_task(self._read(link)))

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def play(self) -> None:
        """Warm prompts are forgotten, everything else is in `answers`."""
        plan, draw = self.plan, random.Random(self.plan.trace_name)
        self._began_s = time.monotonic()
        for each in plan.warm:
            await self._serve("alone", each, self._prompt(each.num_tokens, draw), self._now_s())
        self.answers.clear()
        for each in plan.alone:
            await self._serve("alone", each, self._prompt(each.num_tokens, draw), self._now_s())
        drawn = [(each, self._prompt(each.num_tokens, draw)) for each in plan.arrivals]
        long = [self._prompt(plan.backlog_tokens, draw) for _ in range(4)] if plan.num_backlog else []
        self._began_s = time.monotonic()
        tasks: list[Awaitable[None]] = [self._arrive(each, ids) for each, ids in drawn]
        tasks += [self._back_to_back(place, long) for place in range(plan.num_backlog)]
        await asyncio.gather(*tasks)

    async def _arrive(self, each: Arrival, ids: tuple[int, ...]) -> None:
        await asyncio.sleep(max(self._began_s + each.at_s - time.monotonic(), 0.0))
        await self._serve("arrival", each, ids, each.at_s)

    async def _back_to_back(self, place: int, prompts: Sequence[tuple[int, ...]]) -> None:
        """The next one when the last is over, until load_s."""
        number = place
        while (now_s := self._now_s()) < self.plan.load_s:
            ids = prompts[number % len(prompts)]
            await self._serve("backlog", Arrival(now_s, len(ids), 1), ids, now_s)
            number += 1

    async def _serve(self, kind: Kind, each: Arrival, ids: tuple[int, ...], due_s: float) -> None:
        """To the request's end."""
        plan, flight, sent_s = self.plan, _Flight(), self._now_s()
        name = f"{kind}-{self._num_sent}"
        self._num_sent += 1
        self._flights[name] = flight
        traceparent = f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01" if plan.is_traced and kind != "alone" else ""
        common: dict[str, Any] = {
            "request_id": name, "attempt": 0, "traceparent": traceparent, "remaining_s": plan.limit_s, "prompt_ids": ids, "choices": (0,),
            "sampling": Sampling(max_tokens=each.new_tokens, temperature=0.0, ignore_eos=True),
        }  # fmt: skip
        to_prefill, to_decode = self._links
        to_prefill.post(StartPrefill(**common, decode=plan.decode))
        to_decode.post(StartDecode(**common, prefill=plan.prefill))
        try:
            async with asyncio.timeout(plan.limit_s):
                await flight.over.wait()
        except TimeoutError:
            flight.failed(f"{name}: {len(flight.token_s)} of {each.new_tokens} tokens in {plan.limit_s:g} s")
        if not flight.failure and len(flight.token_s) != each.new_tokens:
            flight.failure = f"{name}: {len(flight.token_s)} tokens, {each.new_tokens} asked for"
        del self._flights[name]
        came_s = tuple(round(at_s - self._began_s, 7) for at_s in sorted(flight.token_s))
        self.answers.append(
            Answer(kind=kind, num_tokens=each.num_tokens, due_s=due_s, sent_s=sent_s, token_s=came_s, failure=flight.failure)
        )

    async def _read(self, link: Connection) -> None:
        with suppress(PeerError):
            while True:
                self._take(await link.receive(), link.received_s)
        for name, flight in self._flights.items():
            flight.failed(f"{name}: the engine closed the socket")

    def _take(self, message: Message, at_s: float) -> None:
        match message:
            case TokensEmitted():
                for token in message.tokens:
                    if (flight := self._flights.get(token.request_id)) is not None:
                        flight.token_s.append(at_s)
            case RequestFinished() if message.request_id in self._flights:
                flight = self._flights[message.request_id]
                flight.legs_left -= 1
                if not flight.legs_left:
                    flight.over.set()
            case RequestFailed() if message.request_id in self._flights:
                self._flights[message.request_id].failed(f"{message.request_id}: {message.code} in {message.phase}: {message.detail}")
            case Preempted() if message.request_id in self._flights:
                self._flights[message.request_id].failed(f"{message.request_id}: preempted, {message.reason}")
            case Refused():
                for name, flight in self._flights.items():
                    flight.failed(f"{name}: a message was refused: {message.code}: {message.detail}")

    def _prompt(self, num_tokens: int, draw: random.Random) -> tuple[int, ...]:
        return tuple(draw.choices(range(FIRST_TOKEN_ID, self.plan.vocab), k=num_tokens))

    def _now_s(self) -> float:
        return round(time.monotonic() - self._began_s, 7)


async def played(plan: ClientPlan) -> list[Answer]:
    """Connect, play, close. Raises PeerError where the services cannot be reached."""
    client = Client(plan)
    try:
        await client.open()
        await client.play()
    finally:
        await client.close()
    return client.answers


def main() -> int:
    for line in sys.stdin:
        plan_path, out = (Path(word) for word in json.loads(line))
        answers = asyncio.run(played(plan_from_json(json.loads(plan_path.read_text()))))
        out.write_text(json.dumps([asdict(one) for one in answers]))
        print("done", flush=True)
    return 0


def answers_from_json(rows: Sequence[dict[str, Any]]) -> list[Answer]:
    """What main() wrote."""
    return [Answer(**(row | {"token_s": tuple(row["token_s"])})) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
