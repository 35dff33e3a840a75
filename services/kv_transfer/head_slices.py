"""Owns which kv heads each rank holds, which of them a pair of ranks hands over, and where their bytes lie. PURE; knows no ring or wire.

p ranks of a prefill replica send to c ranks of a decode replica; each side shards H kv heads by itself:

    tp <= H    rank r holds heads [r H / tp, (r + 1) H / tp)
    tp > H     a head has tp / H replicas: rank r holds head r H // tp alone

Either number must divide the other. KV that every rank holds whole (a latent instead of heads) is H = 1. Each consumer rank is sent
each of its heads by exactly one producer rank; where producer ranks hold the same
head they take its consumers in turn, so that what two of them send differs by one head at most.

A rank's block has the heads it holds, [k, v][kv head][block token][head dim], so those of a pair are one run of bytes among its k and one
among its v. A message of the pair holds just these: [layer][block][k, v][heads of the pair][block token][head dim].
"""

from __future__ import annotations

from dataclasses import dataclass

from duomo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSlice:
    """Some heads of a rank's blocks: `heads`, counted among the `num_heads` that the rank holds."""

    heads: range
    num_heads: int

    @property
    def is_whole(self) -> bool:
        return len(self.heads) == self.num_heads

    def byte_runs(self, head_bytes: int) -> tuple[range, ...]:
        """Where the slice lies in a block, in the order of the message. head_bytes: of k (or of v) of one head of one block.

        One run where it is the whole block, else two: k and v.
        """
        if self.is_whole:
            return (range(2 * self.num_heads * head_bytes),)
        starts = (self.heads.start * head_bytes, (self.num_heads + self.heads.start) * head_bytes)
        return tuple(range(start, start + len(self.heads) * head_bytes) for start in starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSlice:
    """What one producer rank sends to one consumer rank: `heads` of the model, and where both hold them."""

    producer_rank: int
    consumer_rank: int
    heads: range
    in_producer: BlockSlice
    in_consumer: BlockSlice

    def block_bytes(self, head_bytes: int) -> int:
        """Bytes of one block of one layer in a message of this pair: what layout.messages() is called with."""
        return 2 * len(self.heads) * head_bytes


def heads_of(rank: int, tp: int, num_heads: int) -> range:
    """The heads that a rank of tp holds, of the model's num_heads. ConfigError where neither number divides the other."""
    assert num_heads > 0 and 0 <= rank < tp, (rank, tp, num_heads)
    if num_heads % tp and tp % num_heads:
        fitting = ", ".join(str(divisor) for divisor in range(1, num_heads + 1) if num_heads % divisor == 0)
        raise ConfigError(
            f"{tp} tensor-parallel ranks cannot share {num_heads} kv heads evenly: use {fitting} or a multiple of {num_heads} ranks"
        )
    first = rank * num_heads // tp
    return range(first, first + max(1, num_heads // tp))


def head_slices(num_heads: int, producer_tp: int, consumer_tp: int) -> tuple[HeadSlice, ...]:
    """Every pair of ranks that hands KV over, by consumer rank, then by head: both replicas compute this alone and get the same.

    ConfigError where the heads do not fit one of the sides.
    """
    producers = [heads_of(rank, producer_tp, num_heads) for rank in range(producer_tp)]
    consumers = [heads_of(rank, consumer_tp, num_heads) for rank in range(consumer_tp)]
    return tuple(
        HeadSlice(
            producer_rank=rank,
            consumer_rank=consumer,
            heads=shared,
            in_producer=_within(shared, producers[rank]),
            in_consumer=_within(shared, held),
        )
        for consumer, held in enumerate(consumers)
        for rank in _senders(consumer, num_heads, producer_tp, consumer_tp)
        if (shared := _shared(producers[rank], held))
    )


def _senders(consumer_rank: int, num_heads: int, producer_tp: int, consumer_tp: int) -> range:
    """Producer ranks one of each head, those whose turn it is with this consumer rank."""
    num_replicas = max(1, producer_tp // num_heads)
    num_takers = max(1, consumer_tp // num_heads)
    turn = consumer_rank % num_takers * num_replicas // num_takers
    return range(turn, producer_tp, num_replicas)


def _shared(left: range, right: range) -> range:
    return range(max(left.start, right.start), min(left.stop, right.stop))


def _within(heads: range, held: range) -> BlockSlice:
    return BlockSlice(heads=range(heads.start - held.start, heads.stop - held.start), num_heads=len(held))
