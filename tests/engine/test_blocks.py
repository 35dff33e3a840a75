"""Blocks: readers, prefixes, copy-on-write, and a machine that tries to lose one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from duomo.engine.blocks import MAX_BLOCKS_LOOKED_AT, BlockManager, prefix_hashes


def no_copy(src: int, dst: int) -> None:
    raise AssertionError((src, dst))


def test_what_is_known_is_told_without_a_reader() -> None:
    manager = BlockManager(8, 16)
    hashes = prefix_hashes(range(48), 16, "")
    table = manager.allocate(3)
    assert table is not None and manager.num_known(hashes) == 0
    manager.commit(table, hashes)
    manager.free(table)
    assert manager.num_known(hashes) == 3 and manager.num_known(prefix_hashes([*range(32), 99, *range(15)], 16, "")) == 2
    assert (manager.num_held, manager.num_cached) == (0, 3) and manager.num_known(prefix_hashes(range(48), 16, "s")) == 0
    manager.check_integrity()


def test_allocate_all_or_nothing() -> None:
    blocks = BlockManager(5, 16)
    first = blocks.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert blocks.allocate(3) is None and blocks.num_free == 2
    assert blocks.allocate(0) == []
    blocks.free(first)
    assert blocks.num_free == 5 and blocks.num_cached == 0
    blocks.check_integrity()


def test_freeing_twice_is_a_fault() -> None:
    blocks = BlockManager(2, 16)
    (block,) = blocks.allocate(1) or []
    blocks.free([block])
    with pytest.raises(AssertionError, match=f"block {block} is freed"):
        blocks.free([block])


def test_hashes_chain_and_are_salted() -> None:
    tokens = list(range(40))
    assert len(prefix_hashes(tokens, 16, "")) == 2
    assert prefix_hashes(tokens, 16, "")[0] == prefix_hashes(tokens[:16], 16, "")[0]
    assert prefix_hashes([9, *tokens[1:]], 16, "")[1] != prefix_hashes(tokens, 16, "")[1]  # an earlier block changes a later hash
    assert prefix_hashes(tokens, 16, "a") != prefix_hashes(tokens, 16, "b")
    assert prefix_hashes(tokens[:15], 16, "") == []
    whole = prefix_hashes(tokens, 8, "key")
    assert len(whole) == 5
    for num_known in range(6):  # an answer's blocks are hashed from where its prompt's ended
        assert prefix_hashes(tokens, 8, "key", whole[:num_known]) == whole
    assert prefix_hashes([2**32 - 1] * 16, 16, "") != prefix_hashes([0] * 16, 16, "")


def test_prefix_lookup_shares_blocks_and_outlives_its_reader() -> None:
    blocks = BlockManager(6, 16)
    hashes = prefix_hashes(list(range(48)), 16, "key")
    table = blocks.allocate(3) or []
    blocks.commit(table, hashes)
    assert blocks.lookup(hashes[:2]) == table[:2]
    blocks.free(table)
    assert blocks.num_cached == 1 and blocks.num_held == 2
    blocks.free(table[:2])
    assert (blocks.num_free, blocks.num_cached, blocks.num_available) == (3, 3, 6)
    assert blocks.lookup(prefix_hashes(list(range(48)), 16, "other")) == []
    assert blocks.lookup(hashes) == table
    blocks.check_integrity()


def test_eviction_takes_the_end_of_the_oldest_prefix_first() -> None:
    blocks = BlockManager(4, 16)
    hashes = prefix_hashes(list(range(64)), 16, "")
    table = blocks.allocate(4) or []
    blocks.commit(table, hashes)
    blocks.free(table)
    taken = blocks.allocate(1)
    assert taken == [table[3]]
    assert blocks.lookup(hashes) == table[:3]
    blocks.check_integrity()


def test_a_cache_of_nothing_remembers_nothing() -> None:
    blocks = BlockManager(4, 16, max_cached_blocks=0)
    hashes = prefix_hashes(list(range(16)), 16, "")
    table = blocks.allocate(1) or []
    blocks.commit(table, hashes)
    blocks.free(table)
    assert blocks.num_cached == 0 and blocks.num_free == 4 and blocks.lookup(hashes) == []
    blocks.check_integrity()


def test_a_forked_last_block_is_copied_before_it_is_written() -> None:
    blocks, copies = BlockManager(4, 16), []
    table = blocks.allocate(2) or []
    twin = blocks.fork(table)
    assert blocks.append_slot(twin, 20, lambda src, dst: copies.append((src, dst)))
    assert copies == [(table[1], twin[1])] and twin[0] == table[0] and twin[1] != table[1]
    assert blocks.append_slot(table, 20, no_copy)  # alone again: written in place
    assert blocks.append_slot(table, 32, no_copy) and len(table) == 3
    assert not blocks.append_slot(twin, 32, no_copy) and len(twin) == 2  # no block left, nothing changed
    blocks.free(table)
    blocks.free(twin)
    blocks.check_integrity()
    assert blocks.num_free == 4


def test_writing_a_remembered_block_forgets_it() -> None:
    blocks = BlockManager(4, 16)
    hashes = prefix_hashes(list(range(16)), 16, "")
    table = blocks.allocate(1) or []
    blocks.commit(table, hashes)
    assert blocks.writable(table, 0, no_copy)
    assert blocks.lookup(hashes) == []
    blocks.check_integrity()


def test_a_flush_forgets_what_is_cached_and_what_is_in_use() -> None:
    blocks = BlockManager(8, 16)
    hashes = prefix_hashes(list(range(64)), 16, "")
    ended, running = blocks.allocate(2) or [], blocks.allocate(2) or []
    blocks.commit(ended, hashes[:2])
    blocks.free(ended)
    running = blocks.lookup(hashes[:1]) + running
    other = prefix_hashes(list(range(100, 132)), 16, "")
    assert blocks.flush() == 2 and blocks.num_cached == 0 and blocks.num_free == 5
    assert blocks.lookup(hashes) == [] and blocks.digest.told() == ()
    blocks.check_integrity()
    blocks.commit(running, hashes[:3])
    blocks.free(running)
    assert blocks.lookup(hashes) == [] and blocks.num_free == 8, "what was computed before is not found once its request has ended, either"
    fresh = blocks.allocate(2) or []
    blocks.commit(fresh, other)
    blocks.free(fresh)
    assert blocks.lookup(other) == fresh, "what is computed afterwards is"
    blocks.check_integrity()


@pytest.mark.parametrize(
    "damage",
    [
        lambda blocks: blocks._flushed.add(blocks._free[0]),
        lambda blocks: blocks._free.append(blocks._free[0]),
        lambda blocks: blocks._free.pop(),
        lambda blocks: blocks._free.append(99),
        lambda blocks: blocks._readers.update({blocks._free[0]: 1}),
        lambda blocks: blocks._readers.update({next(iter(blocks._readers)): 0}),
        lambda blocks: blocks._cached.update({blocks._free.pop(): None}),
        lambda blocks: blocks._block_of.update({b"x": 0}),
    ],
)
def test_integrity_sees_damage(damage: object) -> None:
    blocks = BlockManager(4, 16)
    blocks.allocate(1)
    assert callable(damage)
    damage(blocks)
    with pytest.raises(AssertionError):
        blocks.check_integrity()
    with pytest.raises(AssertionError):
        blocks.check_at_rest()


def test_a_large_pool_is_counted_at_rest() -> None:
    blocks = BlockManager(MAX_BLOCKS_LOOKED_AT + 1, 16)
    held = blocks.allocate(3)
    blocks.check_at_rest()
    blocks._free.pop()
    with pytest.raises(AssertionError, match="are accounted for"):
        blocks.check_at_rest()
    assert held is not None


class Losing(RuleBasedStateMachine):
    """Sequences come, share prefixes, fork, grow and go; a model of the contents says what every table must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, 4, max_cached_blocks=5)
        self.contents: dict[int, tuple[int, ...]] = {}
        self.live: list[tuple[list[int], list[int], int]] = []  # tokens, table, how many flushes there had been
        self.num_flushes = 0
        self.since: dict[int, int] = {}  # of each block: how many flushes there had been when its sequence began

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=17))
    def start(self, tokens: list[int]) -> None:
        hashes = prefix_hashes(tokens, 4, "")
        table = self.blocks.lookup(hashes)
        for place, block in enumerate(table):
            assert self.contents[block] == tuple(tokens[: place * 4 + 4]), "a prefix hit holds other tokens"
            assert self.since[block] == self.num_flushes, "a prefix from before a flush was found"
        rest = self.blocks.allocate(self.blocks.num_blocks_for(len(tokens)) - len(table))
        if rest is None:
            self.blocks.free(table)
            return
        table += rest
        for place, block in enumerate(table):
            self.contents[block] = tuple(tokens[: place * 4 + 4])
            self.since[block] = self.num_flushes
        self.blocks.commit(table, hashes)
        self.live.append((tokens, table, self.num_flushes))

    @rule()
    def flush(self) -> None:
        self.blocks.flush()
        self.num_flushes += 1
        assert self.blocks.num_cached == 0

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, pick: int, token: int) -> None:
        tokens, table, since = self.live[pick % len(self.live)]
        if self.blocks.append_slot(table, len(tokens), lambda src, dst: self.contents.update({dst: self.contents[src]})):
            tokens.append(token)
            self.contents[table[-1]] = tuple(tokens)
            self.since[table[-1]] = since

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def fork(self, pick: int) -> None:
        tokens, table, since = self.live[pick % len(self.live)]
        self.live.append((list(tokens), self.blocks.fork(table), since))

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def end_known(self, pick: int) -> None:
        """What was generated may be found as well."""
        tokens, table, _ = self.live.pop(pick % len(self.live))
        self.blocks.commit(table, prefix_hashes(tokens, 4, ""))
        self.blocks.free(table)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def distrust(self, pick: int) -> None:
        tokens, table, _ = self.live.pop(pick % len(self.live))
        self.blocks.forget(table)
        found = self.blocks.lookup(prefix_hashes(tokens, 4, ""))
        assert not set(found) & set(table), "what is distrusted was found"
        self.blocks.free(found)
        self.blocks.free(table)

    @precondition(lambda self: self.live)
    @rule(pick=st.integers(0, 99))
    def end(self, pick: int) -> None:
        self.blocks.free(self.live.pop(pick % len(self.live))[1])

    @invariant()
    def nothing_is_lost(self) -> None:
        self.blocks.check_integrity()
        for tokens, table, _ in self.live:
            for place, block in enumerate(table):
                assert self.contents[block] == tuple(tokens[: place * 4 + 4]), "a block changed under its reader"
        if not self.live:
            assert self.blocks.num_free + self.blocks.num_cached == 12


Losing.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLosing = Losing.TestCase
