"""Records a trace for test_replay.py: what a prefill service saw of its arrivals, grants and cancels while real services ran on this CPU.

    PYTHONPATH=. python tests/services/prefill/record_trace.py tests/services/prefill/traces/cpu_pair.json

One prefill and two decode replicas (loopback transport, the embedded model); 60 prompts in two bursts and a trickle, one in ten cancelled.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from duomo.wire.messages import Cancel, HandleOffered, StartDecode, StartPrefill
from duomo.wire.values import Sampling
from services.prefill.leg import Leg
from services.prefill.leg_book import LegBook
from services.prefill.replay import TracePrompt
from tests.services.decode.rig import configuration
from tests.services.decode.scripted_peers import ids
from tests.services.pair_rig import System, address_of, system

NUM_PROMPTS = 60
SPAN_S = 6.0


class Witness:
    """Sees when a book's legs arrive, are announced and are granted."""

    def __init__(self, book: LegBook) -> None:
        self.arrived_s: dict[str, float] = {}
        self.announced_s: dict[str, float] = {}
        self.granted_s: dict[str, float] = {}
        announce, granted = book.announce, book.granted

        def seen_announce(leg: Leg) -> None:
            self.arrived_s[leg.request.request_id] = leg.received_s
            self.announced_s[leg.request.request_id] = time.monotonic()
            announce(leg)

        def seen_granted(message: HandleOffered) -> None:
            self.granted_s[message.request_id] = time.monotonic()
            granted(message)

        book.announce, book.granted = seen_announce, seen_granted  # type: ignore[method-assign]  # a witness, nothing is changed


async def record(folder: Path) -> list[TracePrompt]:
    draw = random.Random(7)
    config = configuration(folder, {"prefill": {"num_blocks": 512}, "decode": {"num_blocks": 512, "max_batch": 16}})
    async with system(config, 1, 2) as made:
        witness = Witness(made.prefills[0][0]._book)
        began_s = time.monotonic()
        told = [_drawn(draw, row) for row in range(NUM_PROMPTS)]
        await asyncio.gather(*(_play(made, prompt, began_s) for prompt in told))
        await made.at_rest()
    return [_seen(prompt, witness, began_s) for prompt in told if prompt.name in witness.arrived_s]


def _drawn(draw: random.Random, row: int) -> TracePrompt:
    at_s = draw.choice([0.5, 2.5]) if row % 2 else draw.uniform(0, SPAN_S)
    return TracePrompt(
        name=f"r{row}",
        at_s=at_s,
        num_tokens=int(2 ** draw.uniform(2, 10)),
        priority=draw.choice([0, 0, 0, 1]),
        peer=f"d{row % 2}",
        cancel_after_s=draw.uniform(0.0, 0.3) if row % 10 == 3 else None,
    )


async def _play(made: System, prompt: TracePrompt, began_s: float) -> None:
    await asyncio.sleep(max(began_s + prompt.at_s - time.monotonic(), 0.0))
    (prefill, to_prefill), d = made.prefills[0], int(prompt.peer[1:])
    decode, to_decode = made.decodes[d]
    prompt_ids, sampling = ids(prompt.num_tokens, int(prompt.name[1:])), Sampling(max_tokens=4, temperature=0.0, ignore_eos=True)
    common = {"request_id": prompt.name, "attempt": 0, "traceparent": "", "remaining_s": 100.0, "priority": prompt.priority}
    both = {"prompt_ids": prompt_ids, "sampling": sampling, "choices": (0,)}
    to_prefill.post(msgspec.convert(common | both | {"decode": address_of(decode)}, StartPrefill))
    to_decode.post(msgspec.convert(common | both | {"prefill": address_of(prefill)}, StartDecode))
    if prompt.cancel_after_s is not None:
        await asyncio.sleep(prompt.cancel_after_s)
        for gateway in (to_prefill, to_decode):
            gateway.post(Cancel(request_id=prompt.name, attempt=0, traceparent="", remaining_s=1.0, reason="cancelled"))
        return
    await made.ended(prompt.name, p=0, d=d)


def _seen(prompt: TracePrompt, witness: Witness, began_s: float) -> TracePrompt:
    """The prompt with the times that were measured."""
    arrived_s, granted_s = witness.arrived_s[prompt.name], witness.granted_s.get(prompt.name)
    return TracePrompt(
        name=prompt.name,
        at_s=round(arrived_s - began_s, 6),
        num_tokens=prompt.num_tokens,
        priority=prompt.priority,
        peer=prompt.peer,
        grant_after_s=None if granted_s is None else round(granted_s - witness.announced_s[prompt.name], 6),
        cancel_after_s=None if prompt.cancel_after_s is None else round(prompt.cancel_after_s, 6),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = asyncio.run(record(Path(scratch)))
    lines = ",\n".join(msgspec.json.encode(prompt).decode() for prompt in found)
    Path(sys.argv[1]).write_text(f"[\n{lines}\n]\n")
    print(f"{len(found)} prompts in {sys.argv[1]}")
