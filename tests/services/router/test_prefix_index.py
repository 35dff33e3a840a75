"""What a replica is thought to know: as its own cache hashes, from what it tells, and from what was sent."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from duomo.engine.blocks import BlockManager, allocate_prompt
from services.router.prefix_index import PrefixIndex, block_digests


def test_digests_are_those_of_a_replicas_own_cache_and_salted() -> None:
    manager = BlockManager(64, 16)
    first = allocate_prompt(manager, range(100), "key")
    assert first is not None
    manager.commit(first.blocks, first.hashes)
    index = PrefixIndex(64)
    index.told(manager.digest.told())
    assert index.num_known(block_digests(range(100), 16, "key")) == 6
    assert index.num_known(block_digests([*range(64), *range(500, 560)], 16, "key")) == 4, "a mark at the fourth block"
    assert index.num_known(block_digests(range(100), 16, "")) == 0, "another key's prompts are not known"
    assert len(block_digests(range(96), 16, "key")) == 5, "the block of the last token is computed anew"
    assert block_digests(range(16), 16, "") == block_digests([], 16, "") == ()


def test_what_was_sent_is_known_before_it_is_told_and_forgotten_in_time() -> None:
    index = PrefixIndex(4)
    index.sent((1, 2, 3))
    assert index.num_known((1, 2, 3)) == 0, "a replica that tells of nothing may have no cache at all"
    index.told((99,))
    assert index.num_known((1, 2, 3, 4)) == 3 and index.num_known((1, 7)) == 1 and index.num_known((7, 8)) == 0
    index.sent((1, 5, 6))
    assert index.num_known((1, 2, 3)) == 2, "four blocks: the ends of chains go before their beginnings"
    assert index.num_known((1, 5, 6)) == 3
    index.told(())
    assert index.num_known((1, 5, 6)) == 0


@given(seed=st.integers(0, 2**32 - 1), num_groups=st.integers(1, 6))
def test_it_never_says_less_than_half_of_what_a_cache_that_forgets_nothing_has(seed: int, num_groups: int) -> None:
    """By reports alone, as another gateway's requests are seen: marks at powers of two."""
    draw = random.Random(seed)
    manager, index = BlockManager(4096, 16), PrefixIndex(4096)
    heads = [[draw.randrange(8000) for _ in range(draw.randrange(0, 400))] for _ in range(num_groups)]
    for _ in range(20):
        prompt = draw.choice(heads) + [draw.randrange(8000) for _ in range(draw.randrange(1, 200))]
        digests = block_digests(prompt, 16, "")
        seen = index.num_known(digests)
        table = allocate_prompt(manager, prompt, "")
        assert table is not None
        has = table.cached_tokens // 16
        assert seen <= has and (seen > has // 2 or has == seen == 0), "and never more"
        manager.commit(table.blocks, table.hashes)
        manager.free(table.blocks)
        index.told(manager.digest.told())
