"""Owns the sources of prompts' block tables: a pool of prefill's own with its prefix cache, or decode's grants. Knows no leg and no tensor.

The prefix cache is off at capacity 0, and bounded by the pool alone at None. Blocks come back by free(), once for each allocate().
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from duomo.engine.blocks import BlockManager, PromptTable, allocate_prompt
from duomo.engine.prefix_digest import PrefixHash
from services.kv_transfer.loans import BlockLoans


class TableSource(Protocol):
    """Gives a prompt its block table when its wave starts. manager: the pool that the blocks are of."""

    @property
    def manager(self) -> BlockManager: ...

    @property
    def num_available(self) -> int:
        """Blocks that granted prompts could get now."""

    def allocate(self, handle_id: int, token_ids: Sequence[int], salt: str, *, reads_cache: bool = True) -> PromptTable | None:
        """The table of the prompt that was granted this handle; None where too few blocks are free. Raises TransferError.

        Without reads_cache none of it is computed already.
        """

    def commit(self, blocks: tuple[int, ...]) -> None:
        """The KV of the prompt with this table is computed: its full blocks may be found by others."""

    def free(self, blocks: tuple[int, ...]) -> None: ...


class PromptBlocks:
    """All blocks of one prefill replica. Handles say nothing about them."""

    def __init__(self, num_blocks: int, block_tokens: int, prefix_cache_blocks: int | None) -> None:
        self.manager = BlockManager(num_blocks, block_tokens, max_cached_blocks=prefix_cache_blocks)
        self._hashes: dict[tuple[int, ...], tuple[PrefixHash, ...]] = {}  # by table: no two live ones are equal, their last blocks differ

    @property
    def num_available(self) -> int:
        return self.manager.num_available

    def allocate(self, handle_id: int, token_ids: Sequence[int], salt: str, *, reads_cache: bool = True) -> PromptTable | None:
        table = allocate_prompt(self.manager, token_ids, salt, reads_cache=reads_cache)
        if table is not None:
            self._hashes[table.blocks] = table.hashes
        return table

    def commit(self, blocks: tuple[int, ...]) -> None:
        self.manager.commit(blocks, self._hashes[blocks])

    def free(self, blocks: tuple[int, ...]) -> None:
        self._hashes.pop(blocks, None)
        self.manager.free(blocks)


class LentTables:
    """The tables that decode's grants hold in the pool of this process: every granted prompt has its blocks."""

    def __init__(self, loans: BlockLoans) -> None:
        self._loans = loans
        self._hashes: dict[tuple[int, ...], tuple[PrefixHash, ...]] = {}

    @property
    def manager(self) -> BlockManager:
        return self._loans.manager

    @property
    def num_available(self) -> int:
        """No wave waits for blocks. Prompts that share a prefix may count more of them together than there are: a wave of fewer, then."""
        return self.manager.num_blocks

    def allocate(self, handle_id: int, token_ids: Sequence[int], salt: str, *, reads_cache: bool = True) -> PromptTable | None:
        table = self._loans.take(handle_id)
        assert reads_cache or not table.cached_tokens, "decode was told of it as prefill was, and looked nothing up"
        self._hashes[table.blocks] = table.hashes
        return table

    def commit(self, blocks: tuple[int, ...]) -> None:
        self.manager.commit(blocks, self._hashes[blocks])

    def free(self, blocks: tuple[int, ...]) -> None:
        self._hashes.pop(blocks, None)
        self._loans.give_back(blocks)
