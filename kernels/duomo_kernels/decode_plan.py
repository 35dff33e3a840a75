"""Owns the cut of a step's decode attention: which tile of which sequence is read in which run, and where pieces go. Knows no keys.

    tiles[s] = max(1, ceil(lengths[s] / BLOCK))        T = sum of tiles        the tiles of all sequences in a row: 0 .. T-1
    run c    = tiles c * L .. (c + 1) * L of the row   L = ceil(T / C): no run is longer than it must be

One launch at the head of a step replaces what every layer's attention would find out again: layers share lengths and block table. Every
program writes what belongs to one sequence: its tiles, the starts and ends of runs that lie in it, its merge. With `late` the first runs
share all but one in `late` tiles; short ones, late_runs times as many, share those. With chunk_tokens a run starts at the first chunk from
its place on, and pieces are chunks: what a sequence's pieces are depends on nothing but its own length.

A sequence of length 0 is one tile without a live key, whose output is zeros. See DecodePlan for the layout.

Legend: S sequences, B blocks (of a row of the table; of a tile), T tiles, C runs, L tiles of a chunk of the writing loop.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._decode_pieces import RUN_WORDS, DecodeConfig, DecodePlan, DecodeShape, allocate_plan
from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous

MAX_SEQUENCES = 1 << 12  # lengths that a program holds in registers: 32 a thread
MIN_LATE_TILES = tl.constexpr(4)  # a late run of two takes longer to start than to read
TILES_AT_ONCE = 128


def decode_plan_reference(lengths_S: Tensor, block_table_SB: Tensor, shape: DecodeShape, config: DecodeConfig) -> DecodePlan:
    """Tile by tile in plain Python. Entries past the last tile are zero."""
    device, block = lengths_S.device, config.block_keys
    plan = allocate_plan(shape, torch.device("cpu") if device.type == "cpu" else device, config)
    lengths, table = lengths_S.tolist(), block_table_SB.tolist()
    tiles = [max(1, -(-length // block)) for length in lengths]
    cuts = run_cuts(sum(tiles), shape.num_main_runs(config, device), config.late, config.late_runs)
    chunk = plan.chunk_tiles
    words, blocks, merges = [], [], []
    starts: list[int] = []  # of runs, in tiles
    pieces: list[tuple[int, int, int]] = []  # of every sequence: first tile, first slot, count
    begin = 0
    for s, count in enumerate(tiles):
        ends = range(chunk, count + chunk, chunk) if chunk else [c - begin for c in cuts[1:] if begin < c < begin + count] + [count]
        ends = [min(end, count) for end in ends]
        slot = s + (begin // chunk if chunk else max(c for c, at in enumerate(cuts[:-1]) if at <= begin))
        starts += [begin, *(begin + end for end in ends[:-1])] if chunk else []
        for tile in range(count):
            end = ends.index(tile + 1) if tile + 1 in ends else None
            mark = 0 if end is None else 1 if len(ends) == 1 else 2 + slot + end
            words.append(s << 42 | max(0, min(block, lengths[s] - tile * block)) << 32 | mark)
            blocks.append(_blocks_of(table[s], tile, lengths[s], shape.block_tokens, block))
        merges.append((slot, len(ends)))
        pieces.append((begin, slot, len(ends)))
        begin += count
    if chunk:
        cuts = [min([at for at in starts if at >= cut], default=begin) for cut in cuts]
    plan.words_T.zero_()[: len(words)] = torch.tensor(words, device=device)
    plan.tiles_T.copy_(plan.words_T >> 32)
    plan.blocks_TB.zero_()[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32, device=device)
    plan.merges_S2.copy_(torch.tensor(merges))
    plan.runs_C8.copy_(torch.tensor([_run_of(start, stop, pieces, bool(chunk)) for start, stop in zip(cuts, cuts[1:], strict=False)]))
    return plan


def run_cuts(total: int, main: int, late: int, late_runs: int = 1) -> list[int]:
    """Where the runs of `total` tiles start, and where the last one stops."""
    short = -(-(total // late) // (main * late_runs)) if late else 0
    rest = total // late if late and short >= MIN_LATE_TILES.value else 0
    long = -(-(total - rest) // main)
    cuts = [min(c * long, total) for c in range(main + 1)]
    return cuts + [min(main * long + c * short, total) for c in range(1, main * late_runs + 1)] if late else cuts


def _blocks_of(row: list[int], tile: int, length: int, block_tokens: int, block: int) -> list[int]:
    if length == 0:
        return [0] * max(1, block // block_tokens)
    if block_tokens >= block:
        many = block_tokens // block
        return [row[tile // many] * many + tile % many]
    each = block // block_tokens
    return [row[min(tile * each + i, (length - 1) // block_tokens)] for i in range(each)]


def _run_of(start: int, stop: int, pieces: list[tuple[int, int, int]], is_chunked: bool) -> list[int]:
    """A record of runs_C8."""
    found = [start, stop, *[0] * (RUN_WORDS - 2)]
    if start >= stop or is_chunked:
        return found
    first, last = (max(s for s, (begin, _, _) in enumerate(pieces) if begin <= at) for at in (start, stop - 1))
    if pieces[first][2] > 1:
        found[2:5] = [first, *pieces[first][1:]]
    if pieces[last][2] > 1 and last != first:
        found[5:8] = [last, *pieces[last][1:]]
    return found


@triton.jit
def _run_start(run, total, main, LATE: tl.constexpr, LATE_RUNS: tl.constexpr):
    """First tile of a run; total for those past the last."""
    if LATE == 0:
        return tl.minimum(run * ((total + main - 1) // main), total)
    else:
        short = (total // LATE + main * LATE_RUNS - 1) // (main * LATE_RUNS)
        rest = tl.where(short >= MIN_LATE_TILES, total // LATE, 0)
        long = (total - rest + main - 1) // main
        return tl.minimum(tl.minimum(run, main) * long + tl.maximum(run - main, 0) * short, total)


@triton.jit
def _run_of_tile(tile, total, main, LATE: tl.constexpr, LATE_RUNS: tl.constexpr):
    if LATE == 0:
        return tile // ((total + main - 1) // main)
    else:
        short = (total // LATE + main * LATE_RUNS - 1) // (main * LATE_RUNS)
        rest = tl.where(short >= MIN_LATE_TILES, total // LATE, 0)
        long = (total - rest + main - 1) // main
        return tl.where(tile < main * long, tile // long, main + (tile - main * long) // tl.maximum(short, 1))


@triton.jit
def _write_runs(
    runs_ptr, seq, begin, tiles, slot, count, total, main, num_runs,
    RUNS_PAD: tl.constexpr, CHUNK: tl.constexpr, LATE: tl.constexpr, LATE_RUNS: tl.constexpr,
):  # fmt: skip
    """What this sequence knows of runs: the starts that lie in it, each the stop of the run before, and who shares it."""
    run_C = tl.arange(0, RUNS_PAD)
    start_C = _run_start(run_C, total, main, LATE, LATE_RUNS)
    stop_C = _run_start(run_C + 1, total, main, LATE, LATE_RUNS)
    is_here_C = (start_C >= begin) & (start_C < begin + tiles)
    is_past_C = start_C >= tl.where(seq == 0, total, total + 1)  # one sequence writes the runs that no tile is left for
    cut_C = start_C
    if CHUNK > 0:
        cut_C = tl.where(is_here_C, begin + tl.minimum((start_C - begin + CHUNK - 1) // CHUNK * CHUNK, tiles), start_C)
    row_C = runs_ptr + run_C * 8
    tl.store(row_C, cut_C, mask=(is_here_C | is_past_C) & (run_C < num_runs))
    tl.store(row_C - 7, cut_C, mask=(is_here_C | is_past_C) & (run_C > 0) & (run_C <= num_runs))
    is_first_C = (is_here_C | is_past_C) & (run_C < num_runs)
    shared = tl.where(count > 1, 1, 0) if CHUNK == 0 else 0
    shared_C = tl.where(is_here_C, shared, 0)
    tl.store(row_C + 2, shared_C * seq, mask=is_first_C)
    tl.store(row_C + 3, shared_C * slot, mask=is_first_C)
    tl.store(row_C + 4, shared_C * count, mask=is_first_C)
    ends_here_C = (start_C < stop_C) & (stop_C > begin) & (stop_C <= begin + tiles)
    is_last_C = (ends_here_C | is_past_C) & (run_C < num_runs)
    shared_C = tl.where(ends_here_C & (start_C < begin), shared, 0)
    tl.store(row_C + 5, shared_C * seq, mask=is_last_C)
    tl.store(row_C + 6, shared_C * slot, mask=is_last_C)
    tl.store(row_C + 7, shared_C * count, mask=is_last_C)


@triton.jit(do_not_specialize=["num_sequences", "max_blocks", "max_tiles", "main", "num_runs"])
def _plan_kernel(
    lengths_ptr,
    table_ptr,
    words_ptr,
    tiles_ptr,
    blocks_ptr,
    runs_ptr,
    merges_ptr,
    num_sequences,
    max_blocks,
    max_tiles,
    main,
    num_runs,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    S_PAD: tl.constexpr,
    RUNS_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    LATE: tl.constexpr,
    LATE_RUNS: tl.constexpr,
    STEP: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    seq = tl.program_id(0)
    lane_S = tl.arange(0, S_PAD)
    wait_for_previous(USE_PDL)  # for lengths and table, and for whoever still reads the plan of the step before
    start_next(USE_PDL)
    length_S = tl.load(lengths_ptr + lane_S, mask=lane_S < num_sequences, other=0)
    tiles_S = tl.where(lane_S < num_sequences, tl.maximum((length_S + BLOCK - 1) // BLOCK, 1), 0)
    total = tl.sum(tiles_S, 0)
    begin = tl.sum(tl.where(lane_S < seq, tiles_S, 0), 0)
    tiles = tl.sum(tl.where(lane_S == seq, tiles_S, 0), 0)
    length = tl.sum(tl.where(lane_S == seq, length_S, 0), 0)
    if CHUNK > 0:
        slot = seq + begin // CHUNK
        count = (tiles + CHUNK - 1) // CHUNK
    else:
        first = _run_of_tile(begin, total, main, LATE, LATE_RUNS)
        slot = seq + first
        count = _run_of_tile(begin + tiles - 1, total, main, LATE, LATE_RUNS) - first + 1
    tl.store(merges_ptr + seq * 2, slot)
    tl.store(merges_ptr + seq * 2 + 1, count)
    _write_runs(runs_ptr, seq, begin, tiles, slot, count, total, main, num_runs, RUNS_PAD, CHUNK, LATE, LATE_RUNS)
    BLOCKS: tl.constexpr = BLOCK // BLOCK_TOKENS if BLOCK > BLOCK_TOKENS else 1
    MANY: tl.constexpr = BLOCK_TOKENS // BLOCK if BLOCK_TOKENS > BLOCK else 1
    last_block = tl.maximum(length - 1, 0) // BLOCK_TOKENS
    table_row_ptr = table_ptr + seq.to(tl.int64) * max_blocks
    for step in range(0, tiles, STEP):
        tile_L = step + tl.arange(0, STEP)
        at_L = begin + tile_L
        is_tile_L = (tile_L < tiles) & (at_L < max_tiles)
        if CHUNK > 0:
            is_end_L = (tile_L + 1 == tiles) | ((tile_L + 1) % CHUNK == 0)
            piece_L = tile_L // CHUNK
        else:
            run_L = _run_of_tile(at_L, total, main, LATE, LATE_RUNS)
            is_end_L = (tile_L + 1 == tiles) | (_run_of_tile(at_L + 1, total, main, LATE, LATE_RUNS) != run_L)
            piece_L = run_L + seq - slot
        mark_L = tl.where(is_end_L, tl.where(count == 1, 1, 2 + slot + piece_L), 0)
        live_L = tl.minimum(tl.maximum(length - tile_L * BLOCK, 0), BLOCK)
        upper_L = seq * 1024 + live_L
        tl.store(words_ptr + at_L, (upper_L.to(tl.int64) << 32) + mark_L, mask=is_tile_L)
        tl.store(tiles_ptr + at_L, upper_L, mask=is_tile_L)
        index_LB = (tile_L // MANY * BLOCKS)[:, None] + tl.arange(0, BLOCKS)[None, :]
        is_live_LB = is_tile_L[:, None] & (index_LB < tl.where(length > 0, 0x7FFFFFFF, 0))
        block_LB = tl.load(table_row_ptr + tl.minimum(index_LB, last_block), mask=is_live_LB, other=0)
        part_LB = block_LB * MANY + tl.where(length > 0, tile_L % MANY, 0)[:, None]
        tl.store(
            blocks_ptr + at_L[:, None] * BLOCKS + tl.arange(0, BLOCKS)[None, :], part_LB, mask=is_tile_L[:, None] & (index_LB < 0x7FFFFFFF)
        )


def decode_plan(lengths_S: Tensor, block_table_SB: Tensor, out: DecodePlan) -> DecodePlan:
    """lengths [S] and block_table [S, max_blocks] int32 -> the plan, written into `out` (allocate_plan), which it returns.

    Lengths are at most max_blocks * block_tokens of the plan's shape. Entries of the table past a length are not read.
    """
    shape, config, device = out.shape, out.config, lengths_S.device
    check("lengths", lengths_S, torch.int32, shape.num_sequences)
    check("block_table", block_table_SB, torch.int32, shape.num_sequences, shape.max_blocks, device=device)
    check_plan(out, device)
    if shape.num_sequences == 0:
        return out
    num_runs = out.runs_C8.shape[0]
    _plan_kernel[(shape.num_sequences,)](
        *(lengths_S, block_table_SB, out.words_T, out.tiles_T, out.blocks_TB, out.runs_C8, out.merges_S2),
        *(shape.num_sequences, shape.max_blocks, out.words_T.shape[0], shape.num_main_runs(config, device), num_runs),
        BLOCK=config.block_keys,
        BLOCK_TOKENS=shape.block_tokens,
        S_PAD=max(16, triton.next_power_of_2(shape.num_sequences)),
        RUNS_PAD=triton.next_power_of_2(num_runs + 1),
        CHUNK=out.chunk_tiles,
        LATE=config.late,
        LATE_RUNS=config.late_runs,
        STEP=TILES_AT_ONCE,
        num_warps=4,
        **pdl_options(device),
    )
    return out


def check_plan(plan: DecodePlan, device: torch.device) -> None:
    shape, config = plan.shape, plan.config
    check("plan.words", plan.words_T, torch.int64, shape.max_tiles(config), device=device)
    check("plan.tiles", plan.tiles_T, torch.int32, shape.max_tiles(config), device=device)
    check(
        "plan.blocks", plan.blocks_TB, torch.int32, shape.max_tiles(config), max(1, config.block_keys // shape.block_tokens), device=device
    )
    check("plan.runs", plan.runs_C8, torch.int32, shape.num_runs(config, device), RUN_WORDS, device=device)
    check("plan.merges", plan.merges_S2, torch.int32, shape.num_sequences, 2, device=device)
    assert shape.num_sequences <= MAX_SEQUENCES, f"{shape.num_sequences} sequences, at most {MAX_SEQUENCES}"
