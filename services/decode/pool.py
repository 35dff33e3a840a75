"""Owns the pool's blocks together with what has been promised of them. Knows legs, no socket and no tensor.

Blocks are taken here (for a leg that is granted, a table that grows, a fork) and come back here on every path that ends a leg.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duomo.engine.blocks import BlockManager, PromptTable, allocate_prompt
from services.decode.leg import Leg, LegState
from services.decode.policy import DecodeLimits, PoolView
from services.kv_transfer.loans import BlockLoans


class Pool:
    """The block manager and the legs that hold its blocks. loans: the pool is shared with the prefill service of this process."""

    def __init__(self, limits: DecodeLimits, loans: BlockLoans | None = None) -> None:
        self.limits = limits
        self.manager = BlockManager(limits.num_blocks, limits.block_tokens, max_cached_blocks=0) if loans is None else loans.manager
        self._loans = loans
        self.holders: dict[int, Leg] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be had now: free ones and cached ones that nobody reads."""
        return self.manager.num_available

    def open_promise_blocks(self) -> int:
        return sum(leg.open_promise() for leg in self.holders.values())

    def unpromised_blocks(self) -> int:
        return self.num_free_blocks - self.open_promise_blocks()

    def view(self) -> PoolView:
        """The pool as the grant policy sees it."""
        legs = self.holders.values()
        return PoolView(
            num_free_blocks=self.num_free_blocks,
            open_promise_blocks=self.open_promise_blocks(),
            num_live_legs=len(legs),
            num_live_choices=sum(len(leg.choices) if leg.state is LegState.RUNNING else len(leg.choice_numbers) for leg in legs),
        )

    def take(self, num_blocks: int) -> list[int]:
        """Blocks that the policy has said are there."""
        blocks = self.manager.allocate(num_blocks)
        assert blocks is not None, f"the policy promised {num_blocks} blocks, {self.num_free_blocks} are free"
        return blocks

    def take_prompt(self, token_ids: Sequence[int], salt: str) -> PromptTable:
        """The table of a prompt that the policy has granted, what is known of it first."""
        table = allocate_prompt(self.manager, token_ids, salt)
        assert table is not None, f"the policy granted {len(token_ids)} tokens, {self.num_free_blocks} blocks are free"
        return table

    def fork(self, table: list[int], num_tokens: int) -> tuple[list[int], tuple[int, int] | None]:
        """The table of a second sequence over the same num_tokens, and the block copy (from, to) that it needs before it is written.

        Full blocks are shared; a last partial one is copied, since both will write it.
        """
        fork = self.manager.fork(table)
        copies: list[tuple[int, int]] = []
        if num_tokens % self.limits.block_tokens:
            was_there = self.manager.writable(fork, num_tokens // self.limits.block_tokens, lambda src, dst: copies.append((src, dst)))
            assert was_there, "a fork's blocks are part of its leg's promise"
        return fork, copies[0] if copies else None

    def give_back(self, blocks: Iterable[int]) -> None:
        """Drop one reader of each block."""
        self.manager.free(list(blocks))

    def check_integrity(self) -> None:
        """Raise AssertionError where a block is lost, or held by nobody."""
        self.manager.check_integrity()
        self.check_at_rest()

    def check_at_rest(self) -> None:
        """The same, but cheap whatever the pool's size: for whenever it is idle."""
        self.manager.check_at_rest()
        if not self.holders and (self._loans is None or not self._loans.num_taken_blocks):
            assert self.num_free_blocks == self.limits.num_blocks, (
                f"{self.limits.num_blocks - self.num_free_blocks} of {self.limits.num_blocks} blocks are held by nobody"
            )
