"""Owns the MoE layer of a few tokens, from router logits to output in two launches. Knows no sort and no tensor core.

    w, ids = gate(logits)                                     softmax rules without groups (_routing.GateRule); ties to the lowest expert
    act[t, k] = silu(gate[e] @ x[t]) * (up[e] @ x[t])         e = ids[t, k]; stored in x's dtype
    y[t] = sum over k of w[t, k] * down[e] @ act[t, k]        summed in float32, in order of rank, rounded once

With few tokens the time is that of reading the chosen experts' weights once, plus every microsecond in which no weight is on its way.
So no launch is spent on the gate: each program ranks its own token's experts by counting, for each expert, those that beat it (one
comparison of all pairs, no serial chain), and reads rows of weights against a vector held in registers.

What may be read when (dependent launch): the logits and num_valid are older than the first kernel. The second reads them, and constant
weights, before its own wait. That is sound because every block of the first kernel calls start_next only after its own wait: when a
block of the second runs, all that came before the first kernel has ended and lies in L2, where .cg reads it (never a stale line of L1).

Several tokens on one expert: the first of them (its leader) computes for all, so that gate and up weights are read once; others leave.
The second kernel reads down's rows once a token, tokens of one tile side by side, so that the second reading finds them in L2.

Legend: T tokens, D model, F expert hidden, E experts, K experts a token, R = T * K routed rows, B rows of a tile, W columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._gate_by_count import all_logits, choices, four_experts, logits_at, ranks
from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous
from duomo_kernels._routing import GateRule
from duomo_kernels._weights import SCALE_BLOCK, ExpertWeights, dequantised

MAX_TOKENS = 64  # members of an expert are bits of one int64
MAX_COLUMNS = 16384  # a row of gate or up is one tile wide
MAX_UNITS = 64  # tiles of down a program: its loop over them is unrolled


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectTiles:
    """How the two kernels cut their work; any values are correct.

    gate_up: programs of `gate_up_rows` x `gate_up_steps` rows of an expert's hidden axis, gate_up_rows pairs of rows in a tile.
    down: programs of `down_rows` outputs, in tiles `down_width` wide, `down_depth` of them on their way at a time (and before the wait).
    is_grouped: tokens that share an expert share its gate and up rows in registers; else each token reads them.
    """

    gate_up_rows: int = 2
    gate_up_steps: int = 16
    gate_up_warps: int = 4
    down_rows: int = 8
    down_width: int = 512
    down_depth: int = 4
    down_warps: int = 4
    is_grouped: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectAnswer:
    """y_TD in x's dtype; counts_E int32, valid rows alone; ids_TK int32 and weights_TK float32, best first, weights of padding zero."""

    y_TD: Tensor
    counts_E: Tensor
    ids_TK: Tensor
    weights_TK: Tensor


def expert_direct_reference(
    logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, rule: GateRule, num_valid: int | None = None
) -> DirectAnswer:
    """The formula in float64, token by token. y_TD and weights_TK stay float64."""
    gate_up_EFD, down_EDF = dequantised(weights)
    num_valid = x_TD.shape[0] if num_valid is None else num_valid
    scores_TE, ids_TE = torch.softmax(logits_TE.double(), -1).sort(dim=-1, descending=True, stable=True)
    ids_TK, weights_TK = ids_TE[:, : rule.top_k], scores_TE[:, : rule.top_k].clone()
    if rule.normalise:
        weights_TK /= weights_TK.sum(-1, keepdim=True)
    weights_TK *= rule.routed_scale
    weights_TK[num_valid:] = 0
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float64, device=x_TD.device)
    for token in range(num_valid):
        for expert, weight in zip(ids_TK[token].tolist(), weights_TK[token], strict=True):
            gate, up = (gate_up_EFD[expert] @ x_TD[token].double()).chunk(2)
            y_TD[token] += weight * (down_EDF[expert] @ (gate * torch.sigmoid(gate) * up))
    counts_E = torch.bincount(ids_TK[:num_valid].flatten(), minlength=weights.num_experts).int()
    return DirectAnswer(y_TD=y_TD, counts_E=counts_E, ids_TK=ids_TK.int(), weights_TK=weights_TK)


@triton.jit
def _pairs(gate_up_ptr, expert, first, end, F: tl.constexpr, D: tl.constexpr, BF: tl.constexpr, W: tl.constexpr):
    """Rows first .. first + BF - 1 (below end) of the expert's gate and up, [BF, 2, W]."""
    row_B, half_2, col_W = tl.arange(0, BF), tl.arange(0, 2), tl.arange(0, W)
    start = gate_up_ptr + (expert.to(tl.int64) * (2 * F) + first) * D
    offset = (row_B[:, None, None] + half_2[None, :, None].to(tl.int64) * F) * D + col_W[None, None, :]
    is_row = (first + row_B < end)[:, None, None]
    if D == W:
        return tl.load(start + offset, mask=is_row, eviction_policy="evict_first")
    return tl.load(start + offset, mask=is_row & (col_W < D)[None, None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _scaled_x(x_W, scale_ptr, expert, first, F: tl.constexpr, D: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr):
    """x in float32 as gate's and up's rows meet it, [1, 2, W]; for fp8 times their scales (one block of rows a tile: BF divides F)."""
    x_12W = x_W[None, None, :].to(tl.float32)
    if SCALE > 0:
        col_W = tl.arange(0, W)
        row_2 = expert.to(tl.int64) * tl.cdiv(2 * F, SCALE) + (first + tl.arange(0, 2) * F) // SCALE
        where_2W = row_2[:, None] * tl.cdiv(D, SCALE) + (col_W // SCALE)[None, :]
        x_12W = x_12W * tl.load(scale_ptr + where_2W, mask=(col_W < D)[None, :], other=0.0)[None, :, :]
    return x_12W


@triton.jit
def _activate(pairs_B2W, x_12W, out_ptr, first, end, BF: tl.constexpr):
    gate_B, up_B = tl.split(tl.sum(pairs_B2W.to(tl.float32) * x_12W, axis=2))
    row_B = first + tl.arange(0, BF)
    tl.store(out_ptr + row_B, (gate_B * tl.sigmoid(gate_B) * up_B).to(out_ptr.dtype.element_ty), mask=row_B < end)


@triton.jit
def _gate_up_tile(
    pairs_B2W, x_W, first, end, token, members, rank_T, expert, T, x_ptr, scale_ptr, act_ptr, K: tl.constexpr, F: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One tile of rows for the program's token (BT = 0, rank_T its rank) or for every token whose bit is set."""
    if BT == 0:
        x_12W = _scaled_x(x_W, scale_ptr, expert, first, F, D, W, SCALE)
        _activate(pairs_B2W, x_12W, act_ptr + (token * K + rank_T) * F, first, end, BF)
    else:
        col_W = tl.arange(0, W)
        for member in range(token, T):
            if ((members >> member) & 1) != 0:
                rank = tl.sum(tl.where(tl.arange(0, BT) == member, rank_T, 0), axis=0)
                other_W = tl.load(x_ptr + member * D + col_W, mask=col_W < D, other=0.0)
                x_12W = _scaled_x(other_W, scale_ptr, expert, first, F, D, W, SCALE)
                _activate(pairs_B2W, x_12W, act_ptr + (member * K + rank) * F, first, end, BF)


@triton.jit
def _gate_up_kernel(
    logits_ptr, x_ptr, gate_up_ptr, scale_ptr, valid_ptr, act_ptr, T, rows, K: tl.constexpr, E: tl.constexpr, D: tl.constexpr,
    F: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr, W: tl.constexpr, SCALE: tl.constexpr,
    HAS_VALID: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, routed): `rows` rows of act of the expert that this token ranks at this place."""
    first, token, rank = tl.program_id(0) * rows, tl.program_id(1) // K, tl.program_id(1) % K
    end = tl.minimum(first + rows, F)
    expert_B, col_W = tl.arange(0, BE), tl.arange(0, W)
    wait_for_previous(USE_PDL)
    x_W = tl.load(x_ptr + token * D + col_W, mask=col_W < D, other=0.0)
    if HAS_VALID:
        T = tl.minimum(T, tl.load(valid_ptr))
        if token >= T:
            return
    rank_B = ranks(logits_ptr, token, all_logits(logits_ptr, token, E, BE, ""), E, BE, "")
    expert = tl.max(tl.where(rank_B == rank, expert_B, 0), axis=0)
    if BT == 0:
        members, rank_T = 0, rank
    else:
        token_T = tl.arange(0, BT)
        own_T = logits_at(logits_ptr, token_T, tl.where(token_T < T, expert, E), E, "")
        all_TB = logits_at(logits_ptr, token_T[:, None], tl.where((token_T < T)[:, None], expert_B[None, :], E), E, "")
        beats_TB = (all_TB > own_T[:, None]) | ((all_TB == own_T[:, None]) & (expert_B < expert)[None, :])
        rank_T = tl.sum(beats_TB.to(tl.int32), axis=1)
        members = tl.sum(tl.where((rank_T < K) & (token_T < T), tl.full([BT], 1, tl.int64) << token_T, 0), axis=0)
        if (members & ((tl.full([], 1, tl.int64) << token) - 1)) != 0:
            return
    even_B2W = _pairs(gate_up_ptr, expert, first, end, F, D, BF, W)
    start_next(USE_PDL)
    for row in range(first, end, 2 * BF):  # the next tile is on its way while one is summed
        odd_B2W = _pairs(gate_up_ptr, expert, row + BF, end, F, D, BF, W)
        _gate_up_tile(even_B2W, x_W, row, end, token, members, rank_T, expert, T, x_ptr, scale_ptr, act_ptr, K, F, D, BT, BF, W, SCALE)
        even_B2W = _pairs(gate_up_ptr, expert, row + 2 * BF, end, F, D, BF, W)
        _gate_up_tile(odd_B2W, x_W, row + BF, end, token, members, rank_T, expert, T, x_ptr, scale_ptr, act_ptr, K, F, D, BT, BF, W, SCALE)


@triton.jit
def _down_tile(down_ptr, expert, first, column, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """Rows first .. first + BD - 1 of the expert's down, columns column .. column + W - 1, as [C, BD / C, W]."""
    row_CB, col_W = tl.arange(0, C)[:, None] * (BD // C) + tl.arange(0, BD // C)[None, :], column + tl.arange(0, W)
    start = down_ptr + (expert.to(tl.int64) * D + first) * F
    where_CBW = row_CB[:, :, None].to(tl.int64) * F + col_W[None, None, :]
    if D % BD == 0 and F % W == 0:
        return tl.load(start + where_CBW, eviction_policy="evict_first")
    is_inside = (first + row_CB < D)[:, :, None] & (col_W < F)[None, None, :]
    return tl.load(start + where_CBW, mask=is_inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _act_tile(act_ptr, column, F: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """[C, 1, W], C equal copies: with 8 elements a thread Triton gives it the layout of down's tile, and nothing passes through shared
    memory between them (seen in the disassembly: two barriers a tile otherwise)."""
    where_C1W = column + (tl.arange(0, C) * 0)[:, None, None] + tl.arange(0, W)[None, None, :]
    if F % W == 0:
        return tl.load(act_ptr + where_C1W)
    return tl.load(act_ptr + where_C1W, mask=where_C1W < F, other=0.0)


@triton.jit
def _down_rows(
    program, logits_ptr, act_ptr, down_ptr, scale_ptr, valid_ptr, y_ptr, T, routed_scale, K: tl.constexpr, E: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    SCALE: tl.constexpr, DEPTH: tl.constexpr, NORMALISE: tl.constexpr, HAS_VALID: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """BD outputs of one token. Everything read before the wait is older than the first kernel (see the top)."""
    token, first = program % T, program // T * BD
    row_B = first + tl.arange(0, BD)
    CHUNKS: tl.constexpr = (F + W - 1) // W
    UNITS: tl.constexpr = K * CHUNKS
    SPARE: tl.constexpr = DEPTH if DEPTH < UNITS else UNITS
    y_ptr += token * D
    if HAS_VALID:
        if token >= tl.load(valid_ptr, cache_modifier=".cg"):
            wait_for_previous(USE_PDL)
            tl.store(y_ptr + row_B, tl.zeros([BD], y_ptr.dtype.element_ty), mask=row_B < D)
            return
    logit_B = all_logits(logits_ptr, token, E, BE, ".cg")
    rank_B = ranks(logits_ptr, token, logit_B, E, BE, ".cg")
    experts, shares, tiles, acts = (), (), (), ()
    packed = four_experts(rank_B, 0, BE)
    for k in tl.static_range(K):
        if k % 4 == 0 and k > 0:
            packed = four_experts(rank_B, k, BE)
        experts = experts + (((packed >> (k % 4 * 16)) & 0xFFFF).to(tl.int32),)  # type: ignore[assignment]  # a growing tuple
    for u in tl.static_range(SPARE):
        tiles = tiles + (_down_tile(down_ptr, experts[u // CHUNKS], first, u % CHUNKS * W, D, F, BD, C, W),)  # type: ignore[assignment]  # a growing tuple
    best = logits_at(logits_ptr, token, experts[0], E, ".cg")  # type: ignore[misc]  # a growing tuple
    total = 0.0 if NORMALISE else tl.sum(tl.exp(logit_B - best), axis=0)
    for k in tl.static_range(K):
        shares = shares + (tl.exp(logits_at(logits_ptr, token, experts[k], E, ".cg") - best),)  # type: ignore[assignment]  # a growing tuple
        if NORMALISE:
            total += shares[k]
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    act_ptr += token * K * F
    for u in tl.static_range(SPARE):
        acts = acts + (_act_tile(act_ptr + u // CHUNKS * F, u % CHUNKS * W, F, C, W),)  # type: ignore[assignment]  # a growing tuple
    sum_CBW = tl.zeros([C, BD // C, W], tl.float32)
    for u in tl.static_range(UNITS):
        act_C1W = acts[u].to(tl.float32) * (shares[u // CHUNKS] / total * routed_scale)
        if SCALE > 0:
            col_11W = u % CHUNKS * W + tl.arange(0, W)[None, None, :]
            block = (experts[u // CHUNKS].to(tl.int64) * tl.cdiv(D, SCALE) + first // SCALE) * tl.cdiv(F, SCALE)
            act_C1W *= tl.load(scale_ptr + block + col_11W // SCALE, mask=col_11W < F, other=0.0)
        sum_CBW += tiles[u].to(tl.float32) * act_C1W
        if u + SPARE < UNITS:
            column = (u + SPARE) % CHUNKS * W
            tiles = tiles + (_down_tile(down_ptr, experts[(u + SPARE) // CHUNKS], first, column, D, F, BD, C, W),)
            acts = acts + (_act_tile(act_ptr + (u + SPARE) // CHUNKS * F, column, F, C, W),)
    sum_B = tl.reshape(tl.sum(sum_CBW, axis=2), [BD])
    tl.store(y_ptr + row_B, sum_B.to(y_ptr.dtype.element_ty), mask=row_B < D)


@triton.jit
def _keep_books(
    logits_ptr, valid_ptr, ids_ptr, weights_ptr, counts_ptr, T, routed_scale, K: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
    BK: tl.constexpr, NORMALISE: tl.constexpr, HAS_VALID: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """The one program that writes ids, weights and the histogram, beside those that compute."""
    wait_for_previous(USE_PDL)
    expert_B, rank_K = tl.arange(0, BE), tl.arange(0, BK)
    num_valid = T
    if HAS_VALID:
        num_valid = tl.minimum(T, tl.load(valid_ptr))
    count_B = tl.zeros([BE], tl.int32)
    for token in range(T):
        rank_B, id_K, weight_K = choices(logits_ptr, token, routed_scale, E, BE, K, BK, NORMALISE)
        tl.store(ids_ptr + token * K + rank_K, id_K, mask=rank_K < K)
        tl.store(weights_ptr + token * K + rank_K, tl.where(token < num_valid, weight_K, 0.0), mask=rank_K < K)
        count_B += ((rank_B < K) & (token < num_valid)).to(tl.int32)
    tl.store(counts_ptr + expert_B, count_B, mask=expert_B < E)


@triton.jit
def _down_kernel(
    logits_ptr, act_ptr, down_ptr, scale_ptr, valid_ptr, y_ptr, ids_ptr, weights_ptr, counts_ptr, T, routed_scale, K: tl.constexpr,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, C: tl.constexpr,
    W: tl.constexpr, SCALE: tl.constexpr, DEPTH: tl.constexpr, NORMALISE: tl.constexpr, HAS_VALID: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """Program 0 keeps the books (it starts first, so that it is never the last to end); the others are (tile, token), token fastest."""
    program = tl.program_id(0)
    if program == 0:
        _keep_books(logits_ptr, valid_ptr, ids_ptr, weights_ptr, counts_ptr, T, routed_scale, K, E, BE, BK, NORMALISE, HAS_VALID, USE_PDL)
    else:
        _down_rows(
            program - 1, logits_ptr, act_ptr, down_ptr, scale_ptr, valid_ptr, y_ptr, T, routed_scale, K, E, D, F, BE, BK, BD, C, W,
            SCALE, DEPTH, NORMALISE, HAS_VALID, USE_PDL,
        )  # fmt: skip


def default_tiles(weights: ExpertWeights, num_tokens: int, top_k: int) -> DirectTiles:
    """Programs of the first kernel: two a multiprocessor for one token (256 equal ones in 132 x 2 places waste 3%), more for several, of
    which some leave at once. The second kernel: 512 programs for 2,048 outputs fit 132 x 4 places."""
    hidden, sms = weights.hidden, num_sms(weights.down_EDF.device)
    rows = min(16, max(1, 4096 // triton.next_power_of_2(weights.dim)))  # 16 KiB of bf16 a tile, two tiles on their way
    if weights.is_fp8:
        rows = 2 * rows if hidden % (2 * rows) == 0 else 1
    cuts = max(1, 2 * sms // (num_tokens * top_k)) if num_tokens == 1 else triton.cdiv(hidden, 16 * rows)
    width = next((w for w in (1024, 512) if hidden % w == 0 or hidden > 4 * w), 256)
    width = min(width, max(16, triton.next_power_of_2(hidden)))
    while top_k * triton.cdiv(hidden, width) > MAX_UNITS:
        width *= 2
    return DirectTiles(
        gate_up_rows=rows,
        gate_up_steps=triton.cdiv(triton.cdiv(hidden, cuts), rows),
        down_rows=4,
        down_width=width,
        down_depth=min(8, max(2, 2048 // width)),
    )


def expert_direct(
    logits_TE: Tensor,
    x_TD: Tensor,
    weights: ExpertWeights,
    rule: GateRule,
    out: DirectAnswer | None = None,
    tiles: DirectTiles | None = None,
    num_valid: Tensor | None = None,
) -> DirectAnswer:
    """The whole layer for up to 64 tokens (meant for T * K <= 64); rows from num_valid [1] int32 on give zeros."""
    num_tokens, num_experts, dim, hidden, top_k = x_TD.shape[0], weights.num_experts, weights.dim, weights.hidden, rule.top_k
    device = x_TD.device
    assert rule.scoring == "softmax" and rule.num_groups == 1, f"{rule}: routed through a Routing instead"
    assert 1 <= num_tokens <= MAX_TOKENS and top_k <= num_experts and dim <= MAX_COLUMNS, (num_tokens, top_k, dim)
    check("x_TD", x_TD, x_TD.dtype, num_tokens, dim)
    check("logits_TE", logits_TE, torch.float32, num_tokens, num_experts, device=device)
    check("down_EDF", weights.down_EDF, torch.float8_e4m3fn if weights.is_fp8 else x_TD.dtype, None, None, None, device=device)
    if num_valid is not None:
        check("num_valid", num_valid, torch.int32, 1, device=device)
    out = empty_answer(x_TD, num_experts, top_k) if out is None else out
    check("y_TD", out.y_TD, x_TD.dtype, num_tokens, dim, device=device)
    check("counts_E", out.counts_E, torch.int32, num_experts, device=device)
    check("ids_TK", out.ids_TK, torch.int32, num_tokens, top_k, device=device)
    check("weights_TK", out.weights_TK, torch.float32, num_tokens, top_k, device=device)
    tiles = default_tiles(weights, num_tokens, top_k) if tiles is None else tiles
    scale = SCALE_BLOCK if weights.is_fp8 else 0
    assert not scale or (hidden % tiles.gate_up_rows == 0 and SCALE_BLOCK % tiles.gate_up_rows == 0), f"{tiles}: a tile over two blocks"
    act_RF = torch.empty(num_tokens * top_k, hidden, dtype=x_TD.dtype, device=device)
    valid = logits_TE if num_valid is None else num_valid  # a pointer that is not read
    shape = {"K": top_k, "E": num_experts, "D": dim, "F": hidden, "BE": triton.next_power_of_2(num_experts), "SCALE": scale}
    shape |= {"HAS_VALID": num_valid is not None, "num_stages": 1, **pdl_options(device)}
    rows = tiles.gate_up_rows * tiles.gate_up_steps
    copies = min(tiles.down_rows, max(1, tiles.down_warps * 32 * 8 // tiles.down_width))
    _gate_up_kernel[(triton.cdiv(hidden, rows), num_tokens * top_k)](
        logits_TE, x_TD, weights.gate_up_EFD, weights.gate_up_scale_Efd, valid, act_RF, num_tokens, rows,
        BT=triton.next_power_of_2(num_tokens) if tiles.is_grouped and num_tokens > 1 else 0, BF=tiles.gate_up_rows,
        W=triton.next_power_of_2(dim), num_warps=tiles.gate_up_warps, **shape,
    )  # fmt: skip
    _down_kernel[(1 + num_tokens * triton.cdiv(dim, tiles.down_rows),)](
        logits_TE, act_RF, weights.down_EDF, weights.down_scale_Edf, valid, out.y_TD, out.ids_TK, out.weights_TK, out.counts_E,
        num_tokens, rule.routed_scale, BK=triton.next_power_of_2(top_k), BD=tiles.down_rows, C=copies, W=tiles.down_width,
        DEPTH=tiles.down_depth, NORMALISE=rule.normalise, num_warps=tiles.down_warps, **shape,
    )  # fmt: skip
    return out


def empty_answer(x_TD: Tensor, num_experts: int, top_k: int, y_TD: Tensor | None = None) -> DirectAnswer:
    """Tensors for expert_direct(out=...), not written; y_TD may be the caller's own."""
    num_tokens, device = x_TD.shape[0], x_TD.device
    return DirectAnswer(
        y_TD=torch.empty_like(x_TD) if y_TD is None else y_TD,
        counts_E=torch.empty(num_experts, dtype=torch.int32, device=device),
        ids_TK=torch.empty(num_tokens, top_k, dtype=torch.int32, device=device),
        weights_TK=torch.empty(num_tokens, top_k, dtype=torch.float32, device=device),
    )
