"""The batch over a pool whose blocks several sequences read: what a preemption gives back is counted by readers."""

from __future__ import annotations

from duomo.engine.blocks import BlockManager, allocate_prompt, commit_prompt
from duomo.wire.messages import PeerAddress, PrefillDone, Sampling, StartDecode
from services.decode.batch import Batch, BatchEnds, Stops
from services.decode.leg import Choice, Leg, LegState
from services.decode.policy import DecodeLimits
from services.decode.pool import Pool
from services.kv_transfer.loans import BlockLoans

COMMON = tuple(range(100, 164))  # 64 tokens: four blocks
LIMITS = DecodeLimits(num_blocks=12, block_tokens=16, watermark_blocks=0, admit_ahead_tokens=1, max_batch=8, max_preemptions=2)


def joined(pool: Pool, batch: Batch, number: int) -> Leg:
    """A leg of the common prefix and one token of its own, in the batch."""
    common = {"request_id": f"r{number}", "attempt": 0, "traceparent": "", "remaining_s": 9.0}
    start = StartDecode(
        **common,  # type: ignore[arg-type]  # one dict for both
        prompt_ids=(*COMMON, number),
        sampling=Sampling(max_tokens=40, temperature=0.0),
        choices=(0,),
        prefill=PeerAddress(replica_id="p", boot_id="p", address=""),
    )
    leg = Leg.of(start, leg_id=number, gateway="g", now_s=0.0, max_preemptions=2)
    table = pool.take_prompt(leg.token_ids, leg.cache_salt)
    assert table.cached_tokens == 64
    leg.blocks, leg.order, leg.state = list(table.blocks), number, LegState.GRANTED
    leg.done = PrefillDone(
        **common,  # type: ignore[arg-type]  # one dict for both
        handle_id=number,
        num_messages=0,
        first_token_ids=(7,),
        ended_choices=(),
        cached_tokens=64,
    )
    pool.holders[leg.leg_id] = leg
    batch.join(leg)
    return leg


def test_a_victim_whose_prefix_others_read_gives_back_its_own_blocks_alone() -> None:
    loans = BlockLoans("d", BlockManager(12, 16, max_cached_blocks=12))
    pool = Pool(LIMITS, loans)
    first = allocate_prompt(pool.manager, COMMON, "")
    assert first is not None
    commit_prompt(pool.manager, COMMON, first.blocks, "")
    pool.give_back(first.blocks)

    gone: list[Choice] = []
    batch = Batch(pool, Stops(eos_ids=(), max_model_tokens=999), BatchEnds(preempted=gone.append, finished=lambda leg: None))
    legs = [joined(pool, batch, number) for number in (1, 2, 3)]
    assert pool.num_free_blocks == 12 - 4 - 3
    others = pool.take(5)
    for leg in legs:
        leg.choices[0].num_kv = 80  # its five blocks are full: each needs one more, beyond its promise

    step = batch.plan()
    assert [choice.leg for choice in step.rows] == legs[:1]
    assert [choice.leg for choice in gone] == legs[1:], "the newest gave one block, for the oldest; so the second had to go as well"
    assert len(legs[0].choices[0].table) == 6 and pool.num_free_blocks == 1
    batch.remove(legs[0].choices[0])
    pool.give_back(others)
    pool.manager.check_integrity()
    assert (pool.num_free_blocks, pool.manager.num_cached) == (12, 4)
