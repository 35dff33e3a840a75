"""What a router is told of a pool's prefixes: bounded, newest first, and nothing that is gone."""

from __future__ import annotations

from duomo.engine.blocks import BlockManager, prefix_hashes
from duomo.engine.prefix_digest import MAX_PREFIXES, PrefixDigest


def chain(num_blocks: int, first: int = 0) -> list[bytes]:
    return prefix_hashes(range(first, first + 4 * num_blocks), 4, "")


def bits(prefix: bytes) -> int:
    return int.from_bytes(prefix[:8], "little")


def test_a_chain_is_told_at_its_end_and_at_powers_of_two() -> None:
    digest, known = PrefixDigest(), chain(100)
    digest.used(known)
    assert digest.told() == tuple(bits(known[num_blocks - 1]) for num_blocks in (100, 64, 32, 16, 8, 4, 2, 1))
    digest.used(chain(1, 5000))
    assert digest.told()[0] == bits(chain(1, 5000)[0]) and len(digest) == 9
    digest.used(known[:64])
    assert digest.told()[:7] == tuple(bits(known[num_blocks - 1]) for num_blocks in (64, 32, 16, 8, 4, 2, 1))
    digest.used([])
    assert len(digest) == 9


def test_a_following_turn_finds_the_end_of_the_one_before_and_a_shared_head_by_half_at_least() -> None:
    digest, turn = PrefixDigest(), chain(37)
    digest.used(turn)
    told = set(digest.told())

    def known_blocks(hashes: list[bytes]) -> int:
        return max((place + 1 for place, prefix in enumerate(hashes) if bits(prefix) in told), default=0)

    assert known_blocks(chain(50)) == 37
    assert known_blocks(chain(37, 1)) == 0
    for shared in range(1, 37):
        assert known_blocks(turn[:shared]) * 2 > shared


def test_the_list_is_bounded_and_drops_the_oldest() -> None:
    digest = PrefixDigest()
    for number in range(MAX_PREFIXES + 40):
        digest.used(chain(1, 4 * number))
    assert len(digest.told()) == MAX_PREFIXES
    assert digest.told()[0] == bits(chain(1, 4 * (MAX_PREFIXES + 39))[0])
    assert bits(chain(1, 0)[0]) not in digest.told()


def test_what_a_pool_evicts_or_forgets_is_told_no_more() -> None:
    blocks = BlockManager(4, 4)
    table, hashes = blocks.allocate(3) or [], chain(3)
    blocks.commit(table, hashes)
    assert blocks.digest.told() == tuple(bits(hashes[place]) for place in (2, 1, 0))
    blocks.free(table)
    taken = blocks.allocate(2) or []  # one was free, the other held the chain's end
    assert blocks.digest.told() == (bits(hashes[1]), bits(hashes[0])) and blocks.num_evicted == 1
    assert blocks.lookup(hashes) == table[:2]
    blocks.forget(table[:2])
    assert blocks.digest.told() == () and blocks.lookup(hashes) == []
    blocks.free([*taken, *table[:2]])
    assert (blocks.num_free, blocks.num_cached) == (4, 0)
    blocks.check_integrity()


def test_a_report_costs_nothing_while_nothing_changes() -> None:
    digest = PrefixDigest()
    digest.used(chain(9))
    assert digest.told() is digest.told()
