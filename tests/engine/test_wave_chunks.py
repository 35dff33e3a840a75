"""Chunks of a wave: every row once, in order, slices that go on where they ended; which walks of the grid are refused."""

from __future__ import annotations

import itertools
import random

import pytest

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.wave_chunks import GridWalk, cut_rows, num_chunks


def wave(*lengths: int) -> StepBatch:
    """Prompt p has tokens 1000 p, 1000 p + 1, ... behind p cached ones."""
    slices = (PromptSlice(token_ids=range(1000 * p, 1000 * p + n), start=p, block_table=[p] * 99) for p, n in enumerate(lengths))
    return StepBatch(slices=tuple(slices))


@pytest.mark.parametrize("chunk_tokens", [1, 16, 63, 64, 257, 1000])
@pytest.mark.parametrize("lengths", [(1,), (63,), (257,), (1, 2, 3), (64, 64), (16, 257, 1, 63), (300, 300)])
def test_chunks_are_the_waves_rows_in_order(lengths: tuple[int, ...], chunk_tokens: int) -> None:
    batch = wave(*lengths)
    chunks = cut_rows(batch, chunk_tokens)
    assert len(chunks) == num_chunks(batch.num_rows, chunk_tokens)
    assert [chunk.num_rows for chunk in chunks[:-1]] == [chunk_tokens] * (len(chunks) - 1) and chunks[-1].num_rows <= chunk_tokens
    assert [chunk.row_lo for chunk in chunks] == [0, *(chunk.row_hi for chunk in chunks[:-1])]
    seen: dict[int, list[int]] = {}
    for chunk in chunks:
        assert chunk.batch.num_rows == chunk.num_rows
        for prompt, part in zip(range(len(lengths))[chunk.prompts], chunk.batch.slices, strict=True):
            assert part.token_ids and part.start == prompt + len(seen.setdefault(prompt, []))
            assert part.block_table == [prompt] * 99
            seen[prompt] += part.token_ids
    assert seen == {prompt: list(part.token_ids) for prompt, part in enumerate(batch.slices)}


def test_a_wave_without_a_limit_is_one_chunk() -> None:
    batch = wave(5, 700)
    (chunk,) = cut_rows(batch, None)
    assert chunk.batch is batch and (chunk.row_lo, chunk.row_hi, num_chunks(705, None)) == (0, 705, 1)
    with pytest.raises(AssertionError, match="chunk_tokens 0"):
        cut_rows(batch, 0)


def test_any_walk_that_keeps_both_orders_is_taken_and_every_other_is_refused() -> None:
    """Cells are checked against the rule itself: (layer, chunk) needs (layer - 1, chunk) and (layer, chunk - 1)."""
    made = random.Random(3)
    for _ in range(50):
        walk, done = GridWalk(3, 4), set[tuple[int, int]]()
        while not walk.is_over:
            allowed = []
            for layer, chunk in itertools.product(range(4), range(3)):
                is_ready = (layer == 0 or (layer - 1, chunk) in done) and (chunk == 0 or (layer, chunk - 1) in done)
                if is_ready and (layer, chunk) not in done:
                    allowed.append((layer, chunk))
                    walk.check((layer, layer + 1), (chunk, chunk + 1))
                else:
                    with pytest.raises(AssertionError):
                        walk.check((layer, layer + 1), (chunk, chunk + 1))
            layer, chunk = made.choice(allowed)
            walk.advance((layer, layer + 1), chunk)
            done.add((layer, chunk))
        assert len(done) == 12 and walk.next_layer == 4


def test_what_is_refused_is_said() -> None:
    walk = GridWalk(2, 4)
    with pytest.raises(AssertionError, match=r"layers 3\.\.5 of 4"):
        walk.check((3, 5), (0, 1))
    with pytest.raises(AssertionError, match=r"chunks 0\.\.3 of 2"):
        walk.check((0, 1), (0, 3))
    with pytest.raises(AssertionError, match="chunk 0 runs layer 0 next, not 1"):
        walk.check((1, 2), (0, 1))
    with pytest.raises(AssertionError, match="chunk 0 has not run layer 1, whose keys chunk 1 needs"):
        walk.check((0, 2), (1, 2))
