"""Pieces: what fits the target, in which order the grid is walked, which groups are complete, how many rows a piece computes."""

from __future__ import annotations

import pytest

from duomo.config import PrefillSection
from duomo.engine.wave_chunks import num_chunks
from services.prefill.pieces import Piece, advanced, finished_groups, next_piece, num_rows, parts_of
from services.prefill.slack import left_s, work_s
from services.prefill.snapshot import Limits, Mode, WaveView
from services.prefill.wave_costs import CostCurve

MILLISECOND_A_ROW = CostCurve(((1.0, 0.001), (1000.0, 1.0)))


def limits_of(mode: Mode, **changes: object) -> Limits:
    section = PrefillSection.model_validate({"mode": mode, "max_wave_tokens": 64, "chunk_tokens": 32, "long_chunk_tokens": 100, **changes})
    return Limits.of(section, num_groups=4, num_blocks=64, max_prompt_tokens=1000)


def wave_of(num_tokens: int, limits: Limits) -> WaveView:
    return WaveView(wave_id=0, num_tokens=num_tokens, num_groups=4, num_chunks=limits.num_chunks_of(num_tokens), target_s=0.0)


@pytest.mark.parametrize("mode", ["layered", "chunked", "whole"])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 64, 65, 100, 101, 250])
def test_pieces_cover_the_grid_once_and_complete_each_group_once(mode: Mode, num_tokens: int) -> None:
    limits = limits_of(mode)
    wave = wave_of(num_tokens, limits)
    assert wave.num_chunks == num_chunks(num_tokens, limits.chunk_tokens_of(num_tokens)), "as the engine cuts it"
    cells, completed, rows, left = [], [], 0, [left_s(wave, limits, MILLISECOND_A_ROW)]
    assert left == [pytest.approx(work_s(num_tokens, limits, MILLISECOND_A_ROW))]
    while wave.has_more:
        piece = next_piece(wave, limits, MILLISECOND_A_ROW, may_run_on=False)
        cells += [(group, chunk) for chunk in range(*piece.chunks) for group in range(*piece.groups)]
        completed += list(finished_groups(wave, piece))
        rows += piece.num_groups * num_rows(wave, piece, limits)
        wave = advanced(wave, piece)
        left.append(left_s(wave, limits, MILLISECOND_A_ROW))
    assert sorted(cells) == [(group, chunk) for group in range(4) for chunk in range(wave.num_chunks)]
    assert completed == [0, 1, 2, 3]
    assert rows == 4 * num_tokens
    assert left == sorted(left, reverse=True) and left[-1] == 0


def test_only_what_is_longer_than_a_wave_and_a_chunk_is_cut() -> None:
    layered, chunked = limits_of("layered"), limits_of("chunked")
    assert [layered.chunk_tokens_of(size) for size in (64, 65, 100, 101)] == [None, None, None, 100]
    assert [chunked.chunk_tokens_of(size) for size in (32, 33)] == [None, 32]
    assert limits_of("whole").chunk_tokens_of(101) == 100
    assert limits_of("layered", max_wave_tokens=200).chunk_tokens_of(200) is None


def test_a_piece_holds_what_fits_the_target_and_never_nothing() -> None:
    limits = limits_of("layered", piece_target_s=0.01)
    for num_tokens, fits, fits_alone in ((3, 3, 4), (10, 1, 4), (11, 1, 4), (19, 1, 4), (21, 1, 1), (64, 1, 1)):
        wave = wave_of(num_tokens, limits)
        assert next_piece(wave, limits, MILLISECOND_A_ROW, may_run_on=False).num_groups == fits, num_tokens
        assert next_piece(wave, limits, MILLISECOND_A_ROW, may_run_on=True).num_groups == fits_alone, num_tokens
    begun = advanced(wave_of(21, limits), Piece(groups=(0, 1), chunks=(0, 1)))
    assert next_piece(begun, limits, MILLISECOND_A_ROW, may_run_on=True).num_groups == 1, "a long wave keeps its boundaries to the last"
    assert next_piece(wave_of(3, limits), limits, CostCurve(), may_run_on=True).num_groups == 1, "nothing is known"
    assert next_piece(wave_of(3, limits), limits, CostCurve(((3.0, 0.0),)), may_run_on=False).num_groups == 4


def test_a_piece_out_of_order_is_a_fault() -> None:
    wave = wave_of(10, limits_of("layered"))
    with pytest.raises(AssertionError):
        advanced(wave, Piece(groups=(1, 2), chunks=(0, 1)))


@pytest.mark.parametrize("groups", [(0, 1), (0, 4), (1, 3)])
@pytest.mark.parametrize("chunks", [(0, 1), (0, 3), (2, 5)])
@pytest.mark.parametrize("by_group", [False, True])
def test_parts_are_the_piece_and_tell_each_group_behind_its_last_chunk(
    groups: tuple[int, int], chunks: tuple[int, int], by_group: bool
) -> None:
    parts = parts_of(Piece(groups=groups, chunks=chunks), by_group=by_group)
    ran = [(chunk, group) for part, _ in parts for chunk in range(*part.chunks) for group in range(*part.groups)]
    assert ran == [(chunk, group) for chunk in range(*chunks) for group in range(*groups)]
    assert [end for _, end in parts if end is not None] == (list(range(*groups)) if by_group else [])
    for part, end in parts:
        assert end is None or (part.chunks[1], part.groups) == (chunks[1], (end, end + 1))
