"""Blocks lent within a process: whoever ends first, a block is free when both have let go."""

from __future__ import annotations

import pytest

from duomo.engine.blocks import BlockManager, PromptTable, allocate_prompt
from duomo.errors import TransferError
from services.kv_transfer.loans import BlockLoans

PROMPT = tuple(range(100, 150))  # 50 tokens: four blocks


def granted(loans: BlockLoans) -> tuple[PromptTable, int]:
    table = allocate_prompt(loans.manager, PROMPT, "")
    assert table is not None
    return table, loans.lend(table)


@pytest.mark.parametrize("first", ["decode", "prefill"])
def test_either_side_may_end_first(first: str) -> None:
    loans = BlockLoans("d", BlockManager(8, 16, max_cached_blocks=0))
    table, handle_id = granted(loans)
    assert loans.take(handle_id) == table
    assert (loans.num_taken_blocks, loans.manager.num_free, loans.counts().num_open_handles) == (4, 4, 1)

    def decode_ends() -> None:
        loans.end(handle_id)
        loans.manager.free(table.blocks)

    def prefill_ends() -> None:
        loans.give_back(table.blocks)

    one, other = (decode_ends, prefill_ends) if first == "decode" else (prefill_ends, decode_ends)
    one()
    assert loans.manager.num_free == 4, "the other side still has them"
    loans.manager.check_integrity()
    other()
    assert (loans.num_taken_blocks, loans.manager.num_free, loans.counts().num_open_handles) == (0, 8, 0)
    loans.manager.check_integrity()


def test_a_loan_that_was_taken_back_cannot_be_taken() -> None:
    loans = BlockLoans("d", BlockManager(8, 16, max_cached_blocks=0))
    table, handle_id = granted(loans)
    assert loans.is_open(handle_id)
    loans.end(handle_id)
    loans.manager.free(table.blocks)
    assert not loans.is_open(handle_id)
    with pytest.raises(TransferError) as refused:
        loans.take(handle_id)
    assert (refused.value.code, refused.value.retryable) == ("grant_withdrawn", True)
    assert (loans.num_taken_blocks, loans.manager.num_free) == (0, 8)


def test_decode_hears_of_blocks_that_come_back() -> None:
    loans, heard = BlockLoans("d", BlockManager(8, 16, max_cached_blocks=0)), []
    loans.on_given_back = lambda: heard.append(loans.num_taken_blocks)
    table, handle_id = granted(loans)
    loans.give_back(loans.take(handle_id).blocks)
    assert heard == [0]
    assert loans.manager.num_sole(table.blocks) == 4
