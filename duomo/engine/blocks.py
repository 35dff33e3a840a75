"""Owns which block belongs to whom: readers, the prefix cache, copy-on-write. Knows no tensor and no request.

A block is free (nobody reads it, nothing to remember), cached (nobody reads it, its tokens may be asked for again), or held (one
reader or more). Always free + cached + held == total. Whoever allocates, forks or looks up blocks is their reader and frees each once.

A full block is remembered by a chained hash of all tokens up to its end and a salt: the same prefix under another salt is another
prefix. A block that more than one reads is never written: `writable` copies the last, partial one before a second sequence writes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from duomo.engine.prefix_digest import PrefixDigest, PrefixHash

MAX_BLOCKS_LOOKED_AT = 4096


def prefix_hashes(token_ids: Sequence[int], block_tokens: int, salt: str, known: Sequence[PrefixHash] = ()) -> list[PrefixHash]:
    """One 16-byte hash for each full block, each over everything before it. known: those of the first blocks, taken as they are."""
    hashes = list(known)
    previous = hashes[-1] if hashes else hashlib.blake2b(salt.encode(), digest_size=16).digest()
    rest = token_ids[len(hashes) * block_tokens : len(token_ids) // block_tokens * block_tokens]
    data = array("I", rest).tobytes()  # little endian wherever this runs
    for start in range(0, len(data), 4 * block_tokens):
        previous = hashlib.blake2b(previous + data[start : start + 4 * block_tokens], digest_size=16).digest()
        hashes.append(previous)
    return hashes


class BlockManager:
    """Blocks 0..num_blocks-1 of block_tokens tokens. Not thread-safe: it belongs to one loop.

    max_cached_blocks bounds the prefix cache (None: all that is not held; 0: nothing is remembered). num_evicted: prefixes that gave way to
    others, or to whoever needed a block. digest: what is known, for a router.
    """

    def __init__(self, num_blocks: int, block_tokens: int, *, max_cached_blocks: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._max_cached = num_blocks if max_cached_blocks is None else max_cached_blocks
        self._free: list[int] = list(range(num_blocks - 1, -1, -1))
        self._readers: dict[int, int] = {}
        self._hash_of: dict[int, PrefixHash] = {}
        self._block_of: dict[PrefixHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._flushed: set[int] = set()  # held blocks from before a flush: never to be found again
        self.num_evicted = 0
        self.digest = PrefixDigest()

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks without a reader that still hold a known prefix; they are given out when free ones run out."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that allocate can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        return len(self._readers)

    @property
    def has_prefix_cache(self) -> bool:
        return self._max_cached > 0

    def num_sole(self, table: Iterable[int]) -> int:
        """How many of these held blocks come back when one reader of each goes."""
        return sum(self._readers[block] == 1 for block in table)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_tokens)

    def allocate(self, n: int) -> list[int] | None:
        """n blocks with one reader each, or None (and nothing taken) where fewer are available. Evicts the least recently used prefixes."""
        if n > self.num_available:
            return None
        blocks = []
        for _ in range(n):
            if not self._free:
                self._evict()
            block = self._free.pop()
            self._readers[block] = 1
            blocks.append(block)
        return blocks

    def free(self, block_ids: Iterable[int]) -> None:
        """Take one reader off each block. Give a whole table in order: its first blocks are kept longest in the prefix cache."""
        for block in reversed(list(block_ids)):
            readers = self._readers.get(block, 0)
            assert readers > 0, f"block {block} is freed but nobody reads it"
            if readers > 1:
                self._readers[block] = readers - 1
                continue
            del self._readers[block]
            self._flushed.discard(block)
            if block in self._hash_of and self._max_cached > 0:
                self._cached[block] = None
                self._trim_cache()
            else:
                self._forget(block)
                self._free.append(block)

    def fork(self, table: Sequence[int]) -> list[int]:
        """The same blocks for a second sequence: one more reader each. See `writable` before either writes."""
        for block in table:
            assert block in self._readers, f"block {block} is forked but nobody reads it"
            self._readers[block] += 1
        return list(table)

    def append_slot(self, table: list[int], num_tokens: int, copy_block: Callable[[int, int], None]) -> bool:
        """Make room in `table` for token number num_tokens (0-based): a new block, or a copy of a last block that others read too.

        False, and nothing changed, where no block is available. copy_block(src, dst) copies the KV (KvCache.copy_block).
        """
        index = num_tokens // self.block_tokens
        assert index <= len(table), (index, len(table))
        if index == len(table):
            grown = self.allocate(1)
            if grown is None:
                return False
            table.extend(grown)
            return True
        return self.writable(table, index, copy_block)

    def writable(self, table: list[int], index: int, copy_block: Callable[[int, int], None]) -> bool:
        """Make table[index] this sequence's own: copied where others read it. False where no block is available."""
        block = table[index]
        if self._readers[block] == 1:
            self._forget(block)  # what is about to be written is not what the hash promised
            return True
        grown = self.allocate(1)
        if grown is None:
            return False
        copy_block(block, grown[0])
        if block in self._flushed:
            self._flushed.add(grown[0])
        self._readers[block] -= 1
        table[index] = grown[0]
        return True

    def num_known(self, hashes: Sequence[PrefixHash]) -> int:
        """How many blocks lookup() would find. Nobody becomes their reader."""
        return next((place for place, prefix in enumerate(hashes) if prefix not in self._block_of), len(hashes))

    def lookup(self, hashes: Sequence[PrefixHash]) -> list[int]:
        """The longest known run of blocks for these hashes, with one more reader each; free them like any other."""
        blocks = []
        for prefix in hashes:
            block = self._block_of.get(prefix)
            if block is None:
                break
            self._cached.pop(block, None)
            self._readers[block] = self._readers.get(block, 0) + 1
            blocks.append(block)
        self.digest.used(hashes[: len(blocks)])
        return blocks

    def commit(self, table: Sequence[int], hashes: Sequence[PrefixHash]) -> None:
        """Remember that table[i] holds the full block of hashes[i]. Their KV is written. The first holder of a hash stays.

        Behind a block from before a flush nothing is remembered: it was computed from that.
        """
        if not self.has_prefix_cache:
            return
        num_known = 0
        for block, prefix in zip(table, hashes, strict=False):
            assert block in self._readers, f"block {block} is committed but nobody reads it"
            if block in self._flushed:
                break
            if prefix not in self._block_of and block not in self._hash_of:
                self._block_of[prefix] = block
                self._hash_of[block] = prefix
            num_known += 1
        self.digest.used(hashes[:num_known])

    def flush(self) -> int:
        """Forget every prefix; how many blocks held one. Held blocks stay their readers', and no later commit makes them known."""
        num_forgotten = len(self._hash_of)
        for block in list(self._hash_of):
            self._forget(block)
        self._free += reversed(self._cached)
        self._cached.clear()
        self._flushed = set(self._readers)
        return num_forgotten

    def forget(self, blocks: Iterable[int]) -> None:
        """What these blocks hold is not to be trusted: nobody finds them any more. Readers keep them, and free them like any other."""
        for block in blocks:
            assert block in self._readers, f"block {block} is forgotten but nobody reads it"
            self._forget(block)

    def check_at_rest(self) -> None:
        """For whenever idle: check_integrity; of a pool as large as a GPU's, where it would hold up the next request, counts alone."""
        if self.num_blocks <= MAX_BLOCKS_LOOKED_AT:
            self.check_integrity()
        num_known = len(self._readers) + len(self._free) + len(self._cached)
        assert num_known == self.num_blocks, f"{num_known} of {self.num_blocks} blocks are accounted for"

    def check_integrity(self) -> None:
        """Raises AssertionError saying what is wrong. For tests, and for small pools whenever idle."""
        held, free, cached = set(self._readers), set(self._free), set(self._cached)
        doubled = [block for block, count in Counter(self._free).items() if count > 1]
        assert not doubled, f"blocks twice in the free list: {doubled}"
        assert not held & free, f"blocks both held and free: {sorted(held & free)}"
        assert not held & cached, f"blocks both held and cached: {sorted(held & cached)}"
        assert not free & cached, f"blocks both free and cached: {sorted(free & cached)}"
        missing = set(range(self.num_blocks)) - held - free - cached
        assert not missing, f"blocks lost: {sorted(missing)}"
        assert len(held) + len(free) + len(cached) == self.num_blocks, "blocks that do not exist are accounted for"
        idle = [block for block, readers in self._readers.items() if readers < 1]
        assert not idle, f"held blocks without a reader: {idle}"
        assert {prefix: block for block, prefix in self._hash_of.items()} == self._block_of, "the prefix table disagrees with the blocks"
        assert cached <= set(self._hash_of), f"cached blocks without a prefix: {sorted(cached - set(self._hash_of))}"
        assert not free & set(self._hash_of), f"free blocks with a prefix: {sorted(free & set(self._hash_of))}"
        assert set(self.digest) <= set(self._block_of), "the digest tells of prefixes that are not known"
        assert self._flushed <= held, f"blocks from before a flush that nobody reads: {sorted(self._flushed - held)}"
        assert not self._flushed & set(self._hash_of), f"blocks from before a flush that are found: {self._flushed & set(self._hash_of)}"

    def _trim_cache(self) -> None:
        while len(self._cached) > self._max_cached:
            self._evict()

    def _evict(self) -> None:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        self._free.append(block)
        self.num_evicted += 1

    def _forget(self, block: int) -> None:
        prefix = self._hash_of.pop(block, None)
        if prefix is not None:
            del self._block_of[prefix]
            self.digest.forgotten(prefix)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTable:
    """A prompt's block table, one reader of each block its holder's; the KV of its first cached_tokens tokens is there already.

    hashes: of its full blocks, for commit(); none where the pool remembers nothing.
    """

    blocks: tuple[int, ...]
    cached_tokens: int
    hashes: tuple[PrefixHash, ...] = ()


def allocate_prompt(manager: BlockManager, token_ids: Sequence[int], salt: str, *, reads_cache: bool = True) -> PromptTable | None:
    """Blocks for the whole prompt, known prefix first; None where too few are available. At least one token is left to compute.

    So the last block is never a known one: a prompt of whole blocks that are all known has its last block computed (and sent) again.
    Without reads_cache all of it is computed: nothing is looked up, and what it holds may be found by others as ever.
    """
    known: list[int] = []
    hashes: list[PrefixHash] = []
    if manager.has_prefix_cache:
        hashes = prefix_hashes(token_ids, manager.block_tokens, salt)
        known = manager.lookup(hashes[: (len(token_ids) - 1) // manager.block_tokens]) if reads_cache else []
    rest = manager.allocate(manager.num_blocks_for(len(token_ids)) - len(known))
    if rest is None:
        manager.free(known)
        return None
    return PromptTable(blocks=(*known, *rest), cached_tokens=len(known) * manager.block_tokens, hashes=tuple(hashes))
