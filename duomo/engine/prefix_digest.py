"""Owns what a pool tells a router of the prefixes that it knows: a bounded list, kept up as they come and go. Knows no block.

Of a chain of n blocks the hashes at 1, 2, 4, ... blocks and at n are told. Whoever hashes a prompt the same way finds the end of an earlier
turn exactly, and a prefix that many prompts share to within a factor of two, by about log2(n) entries a chain. Most recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

PrefixHash = bytes
MAX_PREFIXES = 512  # of 9 bytes each on the wire: some 60 chats of a hundred blocks, in a report of a few kilobytes


class PrefixDigest:
    """The marks of the chains used last. A mark costs a dictionary entry when its chain is used or forgotten; nothing walks the pool."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._marks: OrderedDict[PrefixHash, None] = OrderedDict()  # least recently used first
        self._told: tuple[int, ...] | None = ()

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[PrefixHash]:
        """Least recently used first."""
        return iter(self._marks)

    def used(self, chain: Sequence[PrefixHash]) -> None:
        """All of the chain's blocks are known, and somebody has just put them there or asked for them."""
        if not chain:
            return
        for place in _marks(len(chain)):
            self._marks[chain[place]] = None
            self._marks.move_to_end(chain[place])
        while len(self._marks) > self._max_prefixes:
            self._marks.popitem(last=False)
        self._told = None

    def forgotten(self, prefix: PrefixHash) -> None:
        """The pool has lost a block of this hash."""
        if prefix in self._marks:
            del self._marks[prefix]
            self._told = None

    def told(self) -> tuple[int, ...]:
        """The first 64 bits of each mark, little endian, most recently used first: ReplicaReport.prefix_digests."""
        if self._told is None:
            self._told = tuple(int.from_bytes(prefix[:8], "little") for prefix in reversed(self._marks))
        return self._told


def _marks(num_blocks: int) -> Iterator[int]:
    """Places 0, 1, 3, 7, ... and the last, which is told first."""
    place = 1
    while place < num_blocks:
        yield place - 1
        place *= 2
    yield num_blocks - 1
