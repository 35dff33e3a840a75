"""Every byte of a whole model's block is labelled and moved by the byte ranges of each pair: all ranks end with what they hold, once."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from duomo.errors import ConfigError
from services.kv_transfer import layout
from services.kv_transfer.head_slices import HeadSlice, head_slices, heads_of

Labels = NDArray[np.int64]
UNWRITTEN = -1


def holders(num_heads: int, tp: int) -> list[list[int]] | None:
    """The heads of each rank, head by head: dealt out in order, or each rank its r H // tp-th. None: they cannot be."""
    if num_heads % tp == 0:
        ranks: list[list[int]] = [[] for _ in range(tp)]
        for head in range(num_heads):
            ranks[head * tp // num_heads].append(head)
        return ranks
    if tp % num_heads == 0:
        return [[rank * num_heads // tp] for rank in range(tp)]
    return None


def labelled(num_heads: int, block_tokens: int, head_dim: int, itemsize: int) -> Labels:
    """[k or v, head, token, dim, byte]: a number for each byte of the whole model's block."""
    shape = (2, num_heads, block_tokens, head_dim, itemsize)
    return np.arange(np.prod(shape), dtype=np.int64).reshape(shape)


def moved(whole: Labels, parts: tuple[HeadSlice, ...], producers: list[list[int]], consumers: list[list[int]]) -> list[Labels]:
    """The flat blocks of all consumer ranks, once every pair's message was cut from its producer's block and put into its consumer's."""
    head_bytes = whole[0, 0].size
    landed = [np.full(2 * len(heads) * head_bytes, UNWRITTEN) for heads in consumers]
    for part in parts:
        block = whole[:, producers[part.producer_rank]].reshape(-1)
        message = np.concatenate([block[run.start : run.stop] for run in part.in_producer.byte_runs(head_bytes)])
        assert len(message) == part.block_bytes(head_bytes)
        assert (message == whole[:, part.heads.start : part.heads.stop].reshape(-1)).all(), "[k, v][heads of the pair][token][head dim]"
        target, at = landed[part.consumer_rank], 0
        for run in part.in_consumer.byte_runs(head_bytes):
            assert (target[run.start : run.stop] == UNWRITTEN).all(), "a byte is sent by one rank alone"
            target[run.start : run.stop] = message[at : at + len(run)]
            at += len(run)
        assert at == len(message)
    return landed


def check(num_heads: int, sides: tuple[int, int], block_tokens: int, head_dim: int, itemsize: int) -> None:
    producers, consumers = (holders(num_heads, tp) for tp in sides)
    if producers is None or consumers is None:
        with pytest.raises(ConfigError):
            head_slices(num_heads, *sides)
        return
    whole = labelled(num_heads, block_tokens, head_dim, itemsize)
    landed = moved(whole, head_slices(num_heads, *sides), producers, consumers)
    for heads, block in zip(consumers, landed, strict=True):
        assert (block == whole[:, heads].reshape(-1)).all()


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12, 16])
def test_every_pair_of_sizes_from_one_to_eight_moves_every_byte(num_heads: int) -> None:
    for producer_tp, consumer_tp in product(range(1, 9), repeat=2):
        check(num_heads, (producer_tp, consumer_tp), block_tokens=2, head_dim=3, itemsize=2)


@settings(max_examples=150, deadline=None)
@given(
    num_heads=st.integers(1, 24),
    sides=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    block_tokens=st.integers(1, 5),
    head_dim=st.integers(1, 5),
    itemsize=st.sampled_from([1, 2, 4]),
)
def test_sizes_at_random_move_every_byte(num_heads: int, sides: tuple[int, int], block_tokens: int, head_dim: int, itemsize: int) -> None:
    check(num_heads, sides, block_tokens, head_dim, itemsize)


@pytest.mark.parametrize("num_heads", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("tp", range(1, 13))
def test_ranks_hold_what_the_definition_says(num_heads: int, tp: int) -> None:
    held = holders(num_heads, tp)
    if held is None:
        with pytest.raises(ConfigError, match=rf"{tp} tensor-parallel ranks cannot share {num_heads} kv heads"):
            heads_of(0, tp, num_heads)
    else:
        assert [list(heads_of(rank, tp, num_heads)) for rank in range(tp)] == held


@given(heads_of_model=st.sampled_from([1, 2, 3, 4, 8]), factors=st.tuples(st.integers(1, 8), st.integers(1, 8)))
def test_replicas_of_a_head_send_in_turn(heads_of_model: int, factors: tuple[int, int]) -> None:
    """Where both sides have several ranks a head, what two producer ranks send differs by one head at most."""
    num_producers, num_consumers = (heads_of_model * factor for factor in factors)
    parts = head_slices(heads_of_model, num_producers, num_consumers)
    assert Counter(part.consumer_rank for part in parts) == dict.fromkeys(range(num_consumers), 1)
    sent = Counter(part.producer_rank for part in parts)
    assert max(sent[rank] for rank in range(num_producers)) - min(sent[rank] for rank in range(num_producers)) <= 1


def test_what_is_refused_says_what_would_do() -> None:
    with pytest.raises(ConfigError, match="3 tensor-parallel ranks cannot share 4 kv heads evenly: use 1, 2, 4 or a multiple of 4 ranks"):
        head_slices(4, 3, 4)
    with pytest.raises(ConfigError, match="6 tensor-parallel ranks cannot share 4 kv heads"):
        head_slices(4, 2, 6)


def test_a_pair_of_equals_sends_blocks_whole() -> None:
    for part in head_slices(8, 4, 4):
        assert part.producer_rank == part.consumer_rank and part.in_producer == part.in_consumer
        assert part.in_producer.is_whole and part.in_producer.byte_runs(100) == (range(400),)


def test_one_to_two_by_hand() -> None:
    first, second = head_slices(4, 1, 2)
    assert (first.heads, second.heads) == (range(0, 2), range(2, 4))
    assert second.in_producer.byte_runs(10) == (range(20, 40), range(60, 80))
    assert second.in_consumer.byte_runs(10) == (range(40),) and second.block_bytes(10) == 40


def test_ranges_that_overlap_unevenly_by_hand() -> None:
    """Six heads, three on each of two producer ranks, two on each of three consumer ranks: the middle one hears from both."""
    assert [(part.producer_rank, part.consumer_rank, list(part.heads)) for part in head_slices(6, 2, 3)] == [
        (0, 0, [0, 1]),
        (0, 1, [2]),
        (1, 1, [3]),
        (1, 2, [4, 5]),
    ]


def test_both_sides_cut_a_pair_into_the_same_messages() -> None:
    for part in head_slices(4, 2, 4):
        block_bytes = part.block_bytes(1536)
        sent, expected = (
            layout.messages(range(2, 7), (0, 2, 5), block_bytes, 10_000, side.heads) for side in (part.in_producer, part.in_consumer)
        )
        assert len(sent) > 1
        assert [(s.message_idx, s.group, s.layers, s.block_lo, s.block_hi, s.num_bytes) for s in sent] == [
            (s.message_idx, s.group, s.layers, s.block_lo, s.block_hi, s.num_bytes) for s in expected
        ]
