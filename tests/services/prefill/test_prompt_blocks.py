"""Prompts' blocks and the prefix cache over them."""

from __future__ import annotations

from services.prefill.prompt_blocks import PromptBlocks

PROMPT = tuple(range(100, 150))  # 50 tokens: three full blocks and a part


def test_without_a_cache_every_prompt_is_computed_whole() -> None:
    blocks = PromptBlocks(8, 16, prefix_cache_blocks=0)
    for _ in range(2):
        table = blocks.allocate(1, PROMPT, "")
        assert table is not None and (len(table.blocks), table.cached_tokens) == (4, 0)
        blocks.commit(table.blocks)
        blocks.free(table.blocks)
    assert (blocks.manager.num_free, blocks.manager.num_cached) == (8, 0)


def test_a_known_prefix_is_shared_while_held_and_found_afterwards_within_the_capacity() -> None:
    blocks = PromptBlocks(8, 16, prefix_cache_blocks=2)
    first = blocks.allocate(1, PROMPT, "key")
    assert first is not None
    blocks.commit(first.blocks)
    held = blocks.allocate(1, PROMPT, "key")
    assert held is not None and held.cached_tokens == 48 and held.blocks[:3] == first.blocks[:3] and held.blocks[3] != first.blocks[3]
    blocks.free(held.blocks)
    blocks.free(first.blocks)
    assert blocks.manager.num_cached == 2
    again = blocks.allocate(1, PROMPT, "key")
    other = blocks.allocate(1, PROMPT, "other")
    assert again is not None and again.cached_tokens == 32
    assert other is not None and other.cached_tokens == 0
    blocks.free(again.blocks)
    blocks.free(other.blocks)
    blocks.manager.check_integrity()


def test_a_whole_known_prompt_leaves_one_token_to_compute() -> None:
    blocks = PromptBlocks(8, 16, prefix_cache_blocks=8)
    table = blocks.allocate(1, PROMPT[:32], "")
    assert table is not None
    blocks.commit(table.blocks)
    again = blocks.allocate(1, PROMPT[:32], "")
    assert again is not None and again.cached_tokens == 16


def test_too_few_blocks_take_nothing() -> None:
    blocks = PromptBlocks(5, 16, prefix_cache_blocks=5)
    table = blocks.allocate(1, PROMPT, "")
    assert table is not None
    blocks.commit(table.blocks)
    assert blocks.allocate(1, (*PROMPT, *range(30)), "") is None
    assert blocks.num_available == 1
    blocks.free(table.blocks)
    assert blocks.num_available == 5
    blocks.manager.check_integrity()


def test_who_reads_no_cache_computes_all_of_it_and_leaves_it_to_others() -> None:
    blocks = PromptBlocks(8, 16, prefix_cache_blocks=8)
    first = blocks.allocate(1, PROMPT, "", reads_cache=False)
    assert first is not None
    blocks.commit(first.blocks)
    again = blocks.allocate(1, PROMPT, "", reads_cache=False)
    assert again is not None and again.cached_tokens == 0 and not set(again.blocks) & set(first.blocks)
    blocks.commit(again.blocks)
    for table in (first, again):
        blocks.free(table.blocks)
    found = blocks.allocate(1, PROMPT, "")
    assert found is not None and found.cached_tokens == 48 and found.blocks[:3] == first.blocks[:3]
    blocks.free(found.blocks)
    blocks.manager.check_integrity()
