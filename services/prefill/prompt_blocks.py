"""Owns the KV blocks of prompts and the prefix cache over them. Knows no leg, no tensor and no thread.

The prefix cache is off at capacity 0. Blocks come back by free(), once for each allocate().
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from duomo.engine.blocks import BlockManager, prefix_hashes


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTable:
    """A prompt's block table; the KV of its first cached_tokens tokens is there already."""

    blocks: tuple[int, ...]
    cached_tokens: int


class PromptBlocks:
    """All blocks of one prefill replica."""

    def __init__(self, num_blocks: int, block_tokens: int, prefix_cache_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, block_tokens, max_cached_blocks=prefix_cache_blocks)
        self._uses_cache = prefix_cache_blocks > 0

    @property
    def num_available(self) -> int:
        """Blocks that a prompt could get now."""
        return self.manager.num_available

    def allocate(self, token_ids: Sequence[int], salt: str) -> PromptTable | None:
        """Blocks for the whole prompt, known prefix first; None where too few are available. At least one token is left to compute."""
        known: list[int] = []
        if self._uses_cache:
            known = self.manager.lookup(prefix_hashes(token_ids[:-1], self.manager.block_tokens, salt))
        rest = self.manager.allocate(self.manager.num_blocks_for(len(token_ids)) - len(known))
        if rest is None:
            self.manager.free(known)
            return None
        return PromptTable(blocks=(*known, *rest), cached_tokens=len(known) * self.manager.block_tokens)

    def commit(self, token_ids: Sequence[int], blocks: Sequence[int], salt: str) -> None:
        """The prompt's KV is computed: its full blocks may be found by others."""
        if self._uses_cache:
            self.manager.commit(blocks, prefix_hashes(token_ids, self.manager.block_tokens, salt))

    def free(self, blocks: Sequence[int]) -> None:
        self.manager.free(blocks)
