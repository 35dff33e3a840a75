"""Owns the block pool that both services of one process share, and which blocks decode has lent to prefill. Knows no leg and no tensor.

Decode grants a leg its blocks and lends them under the handle's id; prefill takes the loan when its wave starts, computes into the
blocks, and gives them back when its step thread is done with them. Taking adds a reader to each block, so that either side may end
first: a block is free when both have. No byte moves; the handoff is done when prefill says so. All on one event loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from duomo.engine.blocks import BlockManager, PromptTable
from duomo.errors import TransferError
from services.kv_transfer.agent import SlotCounts


class BlockLoans:
    """lender_boot_id: the decode service of this process. Stands where a split layout has its TransferAgent.

    on_given_back: decode's, set by it: prefill holds fewer blocks than before, so that somebody may be granted.
    """

    transport_name = "owner change"
    failure = None  # there is no thread that could end

    def __init__(self, lender_boot_id: str, manager: BlockManager) -> None:
        self.lender_boot_id = lender_boot_id
        self.manager = manager
        self.num_taken_blocks = 0
        self.on_given_back: Callable[[], None] = lambda: None
        self._open: dict[int, PromptTable] = {}
        self._handle_ids = itertools.count(1)

    # decode

    def lend(self, table: PromptTable) -> int:
        """Offer blocks that decode holds; the id of the handle to send. Ended by end()."""
        handle_id = next(self._handle_ids)
        self._open[handle_id] = table
        return handle_id

    def end(self, handle_id: int) -> None:
        """The KV is there, or decode has given the leg up: the loan cannot be taken any more. What was taken stays taken."""
        self._open.pop(handle_id, None)

    # prefill

    def is_open(self, handle_id: int) -> bool:
        return handle_id in self._open

    def take(self, handle_id: int) -> PromptTable:
        """Become a reader of each block; give_back() them once. Raises TransferError where decode has taken the loan back."""
        table = self._open.get(handle_id)
        if table is None:
            raise TransferError("the decode side took its grant back before the prompt was computed", code="grant_withdrawn")
        self.manager.fork(table.blocks)
        self.num_taken_blocks += len(table.blocks)
        return table

    def give_back(self, blocks: Sequence[int]) -> None:
        """The step thread will not touch the blocks of one take() again."""
        self.num_taken_blocks -= len(blocks)
        self.manager.free(blocks)
        self.on_given_back()

    # both reports

    def counts(self) -> SlotCounts:
        """No slots, no writes: only loans that are open."""
        return SlotCounts(
            num_slots=0,
            num_free_slots=0,
            num_quarantined_slots=0,
            num_open_handles=len(self._open),
            num_retired_rings=0,
            num_writes_in_flight=0,
            counters={},
        )
