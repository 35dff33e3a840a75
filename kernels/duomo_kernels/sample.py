"""Owns the choice of the next token on the device. Knows no model and no request: rows are decided each by its own parameters alone.

The order is that of duomo.engine.sampler: biases; a grammar's mask, ending ids masked while fewer than min_tokens are out; repetition,
frequency, presence penalties; temperature; min-p; top-k; top-p; one uniform number u against the cumulative distribution in vocabulary
order. Temperature 0 takes the first maximum after the penalties. u is bit for bit that of duomo.engine.randomness.

With the integer weights of _sampling.py, among the kept tokens:    token = first v with    sum of w[0..v] > floor(u * sum of all w)

    greedy, plain (no row has limits)    2 launches: summarise (largest logit and sum of weights of each chunk), choose (one program a row:
                                         picks a chunk by the summaries, reads that chunk again)
    limited                              5 launches: summarise, two of measure, collect (_sample_limits.py), choose

The logits cross HBM once. A row's token does not depend on the other rows, on S, or on the mode where the modes apply.

A row whose logits hold a NaN, or whose largest one is infinite, gets token -1 and a flag: whoever reads the ids looks at the flags.

Legend: S rows, V vocabulary, C chunks of a row, R rounds, P pivots, N listed candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous
from duomo_kernels._sample_limits import LAST_RANK, ROUNDS, choose_within_limits, collect, measure
from duomo_kernels._sampling import (
    INFINITE_FLAG,
    LOST_FLAG,
    MAX_COUNT,
    MAX_VOCAB,
    MODE_FLAG,
    NAN_FLAG,
    Penalties,
    SampleRows,
    adjusted,
    draw_below,
    from_order,
    order,
    row_limits,
    row_peak,
    weigh,
)

Mode = Literal["greedy", "plain", "limited"]
EDGE = 2.0**-17  # of the cumulative distribution: a depth of up to 43, rounded to float32, moves a weight by 43 * 2^-24 of itself
GREEDY = tl.constexpr(0)
PLAIN = tl.constexpr(1)
LIMITED = tl.constexpr(2)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTiles:
    """Sizes of the launches. chunk alone moves where weights are rounded: it may depend on the vocabulary, never on the batch.

    chunk: 2,048 logits are 16 a thread of 4 warps, four 16-byte loads in flight, and give one row of 151,936 to 75 multiprocessors.
    tile: logits of a part that measures pivots; its P reductions are shared by more of them. pivots squared cut the depths of a row.
    capacity: listed candidates of a row; block: of them that one pass looks at.
    """

    chunk: int = 2048
    tile: int = 4096
    pivots: int = 16
    capacity: int = 16384
    block: int = 512
    warps: int = 4
    tile_warps: int = 8
    choose_warps: int = 8


TILES = SampleTiles()


def sample_reference(logits_SV: Tensor, rows: SampleRows, penalties: Penalties | None = None) -> tuple[Tensor, Tensor]:
    """(token_S, flag_S) in plain torch and float64, row by row. The tables are read, not changed."""
    num_rows, num_valid = logits_SV.shape[0], int(rows.num_valid)
    token_S = torch.full((num_rows,), -1, dtype=torch.int32)
    flag_S = torch.zeros(num_rows, dtype=torch.int32)
    for row in range(num_valid):
        x_V = _adjusted_reference(logits_SV[row].float().cpu(), row, rows, penalties)
        if bool(x_V.isnan().any()) or bool(x_V.max().isinf()):
            flag_S[row] = NAN_FLAG.value if bool(x_V.isnan().any()) else INFINITE_FLAG.value
        elif float(rows.temperature_S[row]) < 1e-5:
            token_S[row] = int((x_V == x_V.max()).nonzero()[0])
        else:
            share_V = _shares_reference(x_V, row, rows)
            total_V = share_V.cumsum(0)
            point = _uniform(int(rows.seed_S[row]), int(rows.choice_S[row]), int(rows.position_S[row])) * total_V[-1]
            token_S[row] = int((total_V <= point).sum())
    return token_S, flag_S


def misplaced(token_S: Tensor, logits_SV: Tensor, rows: SampleRows, penalties: Penalties | None = None) -> float:
    """How far outside its token's part of the cumulative distribution (float64) a row's point lies, at worst; 1 for a wrong greedy token.

    Up to EDGE is rounding: the point lay at the edge between two tokens.
    """
    worst = 0.0
    for row in range(int(rows.num_valid)):
        x_V, token = _adjusted_reference(logits_SV[row].float().cpu(), row, rows, penalties), int(token_S[row])
        if not 0 <= token < len(x_V):
            return 1.0
        if float(rows.temperature_S[row]) < 1e-5:
            worst = max(worst, float(token != int((x_V == x_V.max()).nonzero()[0])))
            continue
        share_V = _shares_reference(x_V, row, rows)
        share_V /= share_V.sum()
        high = float(share_V[: token + 1].sum())
        point = _uniform(int(rows.seed_S[row]), int(rows.choice_S[row]), int(rows.position_S[row]))
        worst = max(worst, high - float(share_V[token]) - point, point - high, float(share_V[token] == 0))
    return worst


def _adjusted_reference(x_V: Tensor, row: int, rows: SampleRows, penalties: Penalties | None) -> Tensor:
    if penalties is None:
        return x_V
    x_V = x_V.clone()
    slot, mask, num_biases = int(penalties.slot_S[row]), int(penalties.mask_S[row]), int(penalties.num_biases_S[row])
    if num_biases:
        x_V[penalties.bias_ids_LB[slot, :num_biases].long().cpu()] += penalties.bias_LB[slot, :num_biases].cpu()
    if int(rows.position_S[row]) < int(penalties.min_position_S[row]):
        ids = penalties.ending_ids_SE[row].long().cpu()
        x_V[ids[ids >= 0]] = -torch.inf
    vocab = x_V.shape[0]
    if mask >= 0:
        x_V[_bits(penalties.mask_bits_MW[mask])[:vocab] == 0] = -torch.inf
    if slot < 0:
        return x_V
    bits_V = _bits(penalties.prompt_bits_LW[slot])[:vocab]
    count_V = penalties.output_counts_LV[slot].cpu().float()
    scaled_V = torch.where(x_V > 0, x_V / penalties.repetition_S[row].cpu(), x_V * penalties.repetition_S[row].cpu())
    x_V = torch.where((bits_V != 0) | (count_V > 0), scaled_V, x_V)
    x_V = x_V - penalties.frequency_S[row].cpu() * count_V
    return x_V - penalties.presence_S[row].cpu() * (count_V > 0)


def _bits(words_W: Tensor) -> Tensor:
    """0 or 1 of each id, those of the last word's rest too."""
    return (words_W.cpu().long()[:, None] >> torch.arange(32)).flatten() & 1


def _shares_reference(x_V: Tensor, row: int, rows: SampleRows) -> Tensor:
    """Shares of the kept tokens, zero elsewhere, by a full sort."""
    top_k, top_p, min_p = int(rows.top_k_S[row]), float(rows.top_p_S[row]), float(rows.min_p_S[row])
    share_V = torch.softmax(x_V.double() / float(rows.temperature_S[row]), -1)
    share_V = torch.where(share_V >= min_p * share_V.max(), share_V, 0.0)
    order_V = torch.sort(share_V, descending=True, stable=True).indices
    kept_V = share_V[order_V]
    if 0 < top_k < len(kept_V):
        kept_V[top_k:] = 0
    if top_p < 1:
        kept_V[1:] *= (kept_V.cumsum(0) < top_p * kept_V.sum())[:-1]
    return torch.zeros_like(share_V).scatter(0, order_V, kept_V)


def _uniform(seed: int, choice: int, position: int) -> float:
    state = 0
    for word in (seed, choice, position):
        state = (state + word + 0x9E3779B97F4A7C15) % (1 << 64)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % (1 << 64)
        state ^= state >> 31
    return float(state >> 11) * 2.0**-53


@triton.jit
def _summarise(
    source, draw, maxima, sums, measured, listed, num_chunks,
    MODE: tl.constexpr, CHUNK: tl.constexpr, MEASURES: tl.constexpr, ENDINGS: tl.constexpr, PENALISED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of a row: its largest logit (NaN where one is), and the sum of its weights in units of that one's."""
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    chunk, row = tl.program_id(0), tl.program_id(1)
    temperatures, top_ks, top_ps, min_ps, seeds, choices, positions, num_valid = draw
    if row >= tl.load(num_valid):
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = adjusted(source, row, ids, ENDINGS, PENALISED)
    maximum = from_order(tl.max(order(x), axis=0))
    tl.store(maxima + row * num_chunks + chunk, maximum)
    if MODE != GREEDY:
        logits, vocab, row_positions, penalties = source
        is_greedy, scale, top_k, top_p, min_p, reach = row_limits(draw, row, vocab)
        depth = tl.where(x == -float("inf"), float("inf"), (maximum - x) * scale)
        tl.store(sums + row * num_chunks + chunk, tl.sum(weigh(depth), axis=0))
    if MODE == LIMITED:
        if chunk == 0:
            m = tl.arange(0, MEASURES)
            tl.store(measured + row * MEASURES + m, tl.zeros((MEASURES,), tl.float32))
            tl.store(listed + row, 0)


@triton.jit
def _choose_plain(row, draw, scale, peak, maxima, sums, num_chunks, CHUNKS: tl.constexpr):
    """(chunk, weight to pass over in it, in units of its own largest): where a row without limits draws its token."""
    c = tl.arange(0, CHUNKS)
    maximum_C = tl.load(maxima + row * num_chunks + c, mask=c < num_chunks, other=-float("inf"))
    sum_C = tl.load(sums + row * num_chunks + c, mask=c < num_chunks, other=0)
    share_C = tl.where(maximum_C > -float("inf"), tl.exp2((maximum_C - peak) * scale), 0.0).to(tl.float64)
    weight_C = (sum_C.to(tl.float64) * share_C).to(tl.int64)
    point = draw_below(draw, row, tl.sum(weight_C, axis=0))
    total_C = tl.cumsum(weight_C, axis=0)
    is_passed = total_C <= point
    chunk = tl.sum(is_passed.to(tl.int32), axis=0)
    rest = point - tl.sum(tl.where(is_passed, weight_C, 0), axis=0)
    share = tl.sum(tl.where(c == chunk, share_C, 0.0), axis=0)
    chunk_sum = tl.sum(tl.where(c == chunk, sum_C, 0), axis=0)
    return chunk, tl.minimum((rest.to(tl.float64) / share).to(tl.int64), chunk_sum - 1)


@triton.jit
def _choose(
    source, draw, maxima, sums, limit_tables, tokens, flags, num_chunks,
    MODE: tl.constexpr, ROUNDS: tl.constexpr, PIVOTS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr, CAPACITY: tl.constexpr, ENDINGS: tl.constexpr, PENALISED: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One row: the chunk that holds its token, then the token; counts it in the row's slot."""
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    row = tl.program_id(0)
    logits, vocab, row_positions, penalties = source
    temperatures, top_ks, top_ps, min_ps, seeds, choices, positions, num_valid = draw
    if row >= tl.load(num_valid):
        return
    limits = row_limits(draw, row, vocab)
    is_greedy, scale, top_k, top_p, min_p, reach = limits
    is_limited = (top_k > 0) | (top_p < 1) | (min_p > 0)
    c = tl.arange(0, CHUNKS)
    maximum_C = tl.load(maxima + row * num_chunks + c, mask=c < num_chunks, other=-float("inf"))
    has_nan = tl.max((maximum_C != maximum_C).to(tl.int32), axis=0) != 0
    peak = tl.max(tl.where(maximum_C != maximum_C, -float("inf"), maximum_C), axis=0)
    flag = tl.where(has_nan, NAN_FLAG, tl.where(tl.abs(peak) == float("inf"), INFINITE_FLAG, 0))
    flag = tl.where((flag == 0) & (not is_greedy) & ((MODE == GREEDY) | (is_limited & (MODE == PLAIN))), MODE_FLAG, flag)
    token = tl.full((), -1, tl.int32)
    if flag == 0:
        # a greedy row: the first chunk with the largest logit, and in it the first token of that rank
        chunk = tl.min(tl.where(maximum_C == peak, c, CHUNKS), axis=0)
        point = tl.full((), 0, tl.int64)
        edge = (~order(peak)).to(tl.int64)
        edge_id = tl.zeros((), tl.int64) + vocab
        unit = peak
        if MODE == LIMITED:
            if (not is_greedy) & is_limited:
                measured, above, live, num_above, listed, list_x, list_id = limit_tables
                peak_again, flag_again, peak_sum = row_peak(maxima, sums, row, scale, num_chunks, CHUNKS)
                chunk, point, edge, edge_id = choose_within_limits(
                    row, source, draw, limits, peak, peak_sum, measured, above, live, num_above, listed, list_x, list_id, num_chunks,
                    ROUNDS, PIVOTS, CHUNK, CHUNKS, BLOCK, CAPACITY, ENDINGS, PENALISED,
                )  # fmt: skip
        if MODE != GREEDY:
            if (not is_greedy) & (not is_limited):
                chunk, point = _choose_plain(row, draw, scale, peak, maxima, sums, num_chunks, CHUNKS)
                edge = tl.full((), LAST_RANK, tl.int64)
                unit = tl.sum(tl.where(c == chunk, maximum_C, 0.0), axis=0)
                reach = tl.full((), float("inf"), tl.float32)
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        x = adjusted(source, row, ids, ENDINGS, PENALISED)
        rank = (~order(x)).to(tl.int64)
        depth = tl.where(x == -float("inf"), float("inf"), (unit - x) * scale)
        is_kept = (depth <= reach) & ((rank < edge) | ((rank == edge) & (ids <= edge_id)))
        weight = tl.where(is_kept, weigh(depth), 0)
        if MODE == GREEDY:
            place = tl.min(tl.where(is_kept, tl.arange(0, CHUNK), CHUNK), axis=0)
        else:
            place = tl.sum((tl.cumsum(weight, axis=0) <= point).to(tl.int32), axis=0)
        is_found = (place < CHUNK) & (chunk * CHUNK + place < vocab)
        token = tl.where(is_found, chunk * CHUNK + place, -1)
        flag = tl.where(is_found, 0, LOST_FLAG)
    tl.store(tokens + row, token)
    tl.store(flags + row, flag)
    if PENALISED:
        (
            repetitions, frequencies, presences, slots, endings, min_positions, prompt_bits, output_counts,
            masks, mask_bits, num_biases, bias_ids, biases,
        ) = penalties  # fmt: skip
        slot = tl.load(slots + row).to(tl.int64)
        if (slot >= 0) & (token >= 0):
            at = output_counts + slot * vocab + token
            tl.store(at, tl.minimum(tl.load(at).to(tl.int32) + 1, MAX_COUNT).to(tl.int16))


def sample(
    logits_SV: Tensor,
    rows: SampleRows,
    *,
    mode: Mode = "limited",
    penalties: Penalties | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    tiles: SampleTiles = TILES,
) -> tuple[Tensor, Tensor]:
    """Choose a token for each valid row of logits (float32 or bf16). Returns token_S and flag_S, int32; padded rows are left as they are.

    mode: what the rows may ask for, known to the host: "greedy" (all are), "plain" (none that is not has a limit), "limited" (any). A row
    that asks for more gets a flag, not a wrong token. Emitted tokens are counted in the penalty slots; rows share none.
    """
    num_rows, vocab = logits_SV.shape
    device = logits_SV.device
    _check(logits_SV, rows, penalties)
    token_S, flag_S = (torch.empty(num_rows, dtype=torch.int32, device=device) for _ in range(2)) if out is None else out
    check("token_S", token_S, torch.int32, num_rows, device=device)
    check("flag_S", flag_S, torch.int32, num_rows, device=device)
    if num_rows == 0:
        return token_S, flag_S
    source = (logits_SV, vocab, rows.position_S, (flag_S,) if penalties is None else penalties.arguments())
    draw = rows.arguments()
    num_chunks = triton.cdiv(vocab, tiles.chunk)
    chunks = triton.next_power_of_2(num_chunks)
    shared = {
        "ENDINGS": 0 if penalties is None else penalties.ending_ids_SE.shape[1],
        "PENALISED": penalties is not None,
        "enable_fp_fusion": False,  # all kernels, and the CPU, must round a depth or a penalty alike
        **pdl_options(device),
    }
    kind = {"greedy": GREEDY.value, "plain": PLAIN.value, "limited": LIMITED.value}[mode]
    maxima_SC = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device)
    sums_SC = torch.empty(num_rows, num_chunks, dtype=torch.int64, device=device)
    tables = _limit_tables(num_rows, num_chunks, tiles, device) if mode == "limited" else (flag_S,) * 7
    measured_SRP, above_SC, live_SC, num_above_SC, listed_S, list_x_SN, list_id_SN = tables
    _summarise[(num_chunks, num_rows)](
        source, draw, maxima_SC, sums_SC, measured_SRP, listed_S, num_chunks,
        MODE=kind, CHUNK=tiles.chunk, MEASURES=ROUNDS * tiles.pivots, num_warps=tiles.warps, **shared,
    )  # fmt: skip
    if mode == "limited":
        for done in range(ROUNDS):
            measure[(triton.cdiv(vocab, tiles.tile), num_rows)](
                source, draw, maxima_SC, sums_SC, measured_SRP, num_chunks,
                DONE=done, ROUNDS=ROUNDS, PIVOTS=tiles.pivots, TILE=tiles.tile, CHUNKS=chunks, num_warps=tiles.tile_warps, **shared,
            )  # fmt: skip
        collect[(num_chunks, num_rows)](
            source, draw, maxima_SC, sums_SC, measured_SRP, above_SC, live_SC, num_above_SC, listed_S, list_x_SN, list_id_SN, num_chunks,
            ROUNDS=ROUNDS, PIVOTS=tiles.pivots, CHUNK=tiles.chunk, CHUNKS=chunks, CAPACITY=tiles.capacity,
            num_warps=tiles.tile_warps, **shared,
        )  # fmt: skip
    _choose[(num_rows,)](
        source, draw, maxima_SC, sums_SC, tables, token_S, flag_S, num_chunks,
        MODE=kind, ROUNDS=ROUNDS, PIVOTS=tiles.pivots, CHUNK=tiles.chunk, CHUNKS=chunks, BLOCK=tiles.block, CAPACITY=tiles.capacity,
        num_warps=tiles.choose_warps, **shared,
    )  # fmt: skip
    return token_S, flag_S


def _check(logits_SV: Tensor, rows: SampleRows, penalties: Penalties | None) -> None:
    num_rows, vocab = logits_SV.shape
    device = logits_SV.device
    assert logits_SV.dtype in (torch.float32, torch.bfloat16) and 0 < vocab <= MAX_VOCAB and num_rows < 1 << 16, logits_SV.shape
    check("logits_SV", logits_SV, logits_SV.dtype, num_rows, vocab)
    rows.check(num_rows, device)
    if penalties is not None:
        penalties.check(num_rows, vocab, device)


def _limit_tables(num_rows: int, num_chunks: int, tiles: SampleTiles, device: torch.device) -> tuple[Tensor, ...]:
    """What the kernels of _sample_limits.py hand to each other; in its order."""

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=dtype, device=device)

    above_SC, live_SC, num_above_SC = empty(torch.int64, num_chunks), empty(torch.int64, num_chunks), empty(torch.int32, num_chunks)
    list_x_SN, list_id_SN = empty(torch.float32, tiles.capacity), empty(torch.int32, tiles.capacity)
    measured_SRP = empty(torch.float32, ROUNDS, tiles.pivots)
    return measured_SRP, above_SC, live_SC, num_above_SC, empty(torch.int32), list_x_SN, list_id_SN
