"""PURE: what a replica seems to remember of prompts, from what it reports and what this gateway has sent there. Knows no token.

Prompts are known by the chained hashes of their full blocks (duomo/engine/blocks.py), of each the 64 bits that reports tell. A report tells
of a chain's blocks 1, 2, 4, ... and its last (duomo/engine/prefix_digest.py), the same to every gateway: that is how several agree. What
this gateway sent is kept whole, so that it need not wait for a report, and finds more than a report has room for.

Both may say too much: a report is a tenth of a second old, and what was sent may have given way to what others sent. Then the replica
computes those blocks once more, and knows them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from duomo.engine.blocks import prefix_hashes

MAX_SENT_BLOCKS: Final = 65_536  # some 8 MB for each replica


def block_digests(token_ids: Sequence[int], block_tokens: int, salt: str) -> tuple[int, ...]:
    """The 64 bits by which reports tell of each full block of a prompt, but of none that holds its last token: that is always computed."""
    usable = token_ids[: (len(token_ids) - 1) // block_tokens * block_tokens]
    return tuple(int.from_bytes(prefix[:8], "little") for prefix in prefix_hashes(usable, block_tokens, salt))


class PrefixIndex:
    """Of one replica. max_blocks: how many blocks it could remember at all."""

    def __init__(self, max_blocks: int) -> None:
        self._max_sent = min(max_blocks, MAX_SENT_BLOCKS)
        self._told: tuple[int, ...] = ()
        self._told_set: frozenset[int] = frozenset()
        self._sent: OrderedDict[int, None] = OrderedDict()  # least recently sent first

    def told(self, digests: tuple[int, ...]) -> None:
        """ReplicaReport.prefix_digests of its last report."""
        if digests != self._told:
            self._told = digests
            self._told_set = frozenset(digests)

    def sent(self, digests: Sequence[int]) -> None:
        """A prompt of these blocks goes there: it will know them. Its beginning is kept the longest, as replicas do."""
        for digest in reversed(digests[: self._max_sent]):
            self._sent[digest] = None
            self._sent.move_to_end(digest)
        while len(self._sent) > self._max_sent:
            self._sent.popitem(last=False)

    def num_known(self, digests: Sequence[int]) -> int:
        """How many of a prompt's first blocks are known there. 0 of a replica that tells of none: its cache is off, or empty."""
        if not self._told:
            return 0
        told, sent = self._told_set, self._sent
        for place in range(len(digests) - 1, -1, -1):
            if digests[place] in told or digests[place] in sent:
                return place + 1
        return 0
