"""KV between ranks of two replicas that shard heads differently, in a process each, over NIXL: each ends with its heads' bytes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.services.kv_transfer.rank_process import UNWRITTEN, Prompt, serve

NUM_PRODUCERS, NUM_CONSUMERS = 2, 4

pytestmark = pytest.mark.timeout(300)  # the first one starts six processes


class RankProcess:
    """rank_process.py in a process of its own."""

    def __init__(self, role: str, rank: int) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload([serve.__module__])  # torch and NIXL are imported once, not by each of six
        self.rank = rank
        self.boot_id = f"{role}-{rank}-{time.monotonic_ns()}"
        self._pipe, theirs = forks.Pipe()
        self._process = forks.Process(target=serve, args=(theirs, self.boot_id, rank), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self, wait_s: float = 100.0) -> Any:
        assert self._pipe.poll(wait_s), f"{self.boot_id} does not answer"
        is_right, result = self._pipe.recv()
        assert is_right, result
        return result

    def ask(self, what: str, *arguments: object) -> Any:
        self._pipe.send((what, arguments))
        return self.answer()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(("close", ()))
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(60)


Ranks = tuple[list[RankProcess], list[RankProcess]]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Prefill's and decode's, each pair with a ring."""
    producers = [RankProcess("p", rank) for rank in range(NUM_PRODUCERS)]
    consumers = [RankProcess("d", rank) for rank in range(NUM_CONSUMERS)]
    try:
        for process in (*producers, *consumers):
            process.answer(wait_s=200.0)
        for producer in producers:
            for consumer in consumers:
                producer.ask("attach_ring", consumer.boot_id, consumer.ask("open_ring", producer.boot_id))
        yield producers, consumers
    finally:
        for process in (*producers, *consumers):
            process.close()


def hand_over(prompt: Prompt, producers: list[RankProcess], consumers: list[RankProcess]) -> int:
    """Every pair's messages, pushed and landed; how many handles that took."""
    deadline_s, num_pushed, num_landed = time.monotonic() + 100, 0, 0
    open_handles = []
    for consumer in consumers:
        for producer_rank, handle in consumer.ask("grant", prompt, [producer.boot_id for producer in producers]):
            num_pushed += producers[producer_rank].ask("push", prompt, handle, consumer.rank)
            open_handles.append((producers[producer_rank], handle.handle_id))
    num_left = num_pushed
    while num_left:
        assert time.monotonic() < deadline_s, f"{num_left} messages did not land"
        num_left = 0
        for consumer in consumers:
            landed, num_to_come = consumer.ask("land")
            num_left += num_to_come
            num_landed += len(landed)
            for producer_rank, handle_id, message_idx in landed:
                producers[producer_rank].ask("credit", handle_id, message_idx)
    assert num_landed == num_pushed, "both sides cut the same messages"
    for producer, handle_id in open_handles:
        producer.ask("end", handle_id)
    return len(open_handles)


# (heads of each prefill rank, heads of each decode rank, handles), by hand
LAYOUTS = {
    "1 to 1": ([[0, 1, 2, 3]], [[0, 1, 2, 3]], 1),
    "1 to 2": ([[0, 1, 2, 3]], [[0, 1], [2, 3]], 2),
    "2 to 1": ([[0, 1], [2, 3]], [[0, 1, 2, 3]], 2),
    "2 to 2": ([[0, 1], [2, 3]], [[0, 1], [2, 3]], 2),
    "2 to 4": ([[0, 1], [2, 3]], [[0], [1], [2], [3]], 4),
    "2 to 3, cut across": ([[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4, 5]], 4),
    "2 to 4, replicated at decode": ([[0], [1]], [[0], [0], [1], [1]], 4),
    "2 to 1, replicated at prefill": ([[0], [0]], [[0]], 1),
}


@pytest.mark.parametrize(("num_blocks", "first_block"), [(13, 0), (13, 5), (1, 0)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_decode_rank_gets_its_heads(name: str, num_blocks: int, first_block: int, ranks: Ranks) -> None:
    at_prefill, at_decode, num_handles = LAYOUTS[name]
    producers, consumers = ranks[0][: len(at_prefill)], ranks[1][: len(at_decode)]
    prompt = Prompt(
        num_heads=max(max(heads) for heads in at_prefill) + 1,
        producer_tp=len(at_prefill),
        consumer_tp=len(at_decode),
        num_blocks=num_blocks,
        first_block=first_block,
        seed=sum(name.encode()) + num_blocks + first_block,
    )
    for producer, heads in zip(producers, at_prefill, strict=True):
        producer.ask("hold", heads, prompt, True)
    for consumer, heads in zip(consumers, at_decode, strict=True):
        consumer.ask("hold", heads, prompt, False)

    assert hand_over(prompt, producers, consumers) == num_handles

    whole = prompt.whole_kv()
    for consumer, heads in zip(consumers, at_decode, strict=True):
        table, pool = consumer.ask("held")
        expected = np.full_like(pool, UNWRITTEN)
        expected[:, table[first_block:]] = whole[:, first_block:, :, heads]
        assert (pool == expected).all(), f"decode rank {consumer.rank}: other bytes than sent, or in other blocks"
        counts = consumer.ask("counts")
        assert (counts.num_free_slots, counts.num_open_handles) == (counts.num_slots, 0)
    assert all(producer.ask("counts").num_writes_in_flight == 0 for producer in producers)
