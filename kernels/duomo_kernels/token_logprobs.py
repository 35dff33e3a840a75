"""Owns the log-probabilities of chosen tokens and of the likeliest ones. Knows no sampling: it reads the raw logits.

    logprob(v) = x[v] - log sum over u of exp(x[u])        of float32 or bf16 logits x, as duomo.engine.sampler reports them

for the row's token and for its `num_top` likeliest tokens, best first, the lower id first where logits are equal. Two launches: every chunk
of a row finds its own N best and its sum; then one program a row merges the chunks' lists, which are in order already: the best of all is
the best of their heads. A row with num_top below 0, a padded row and its outputs are left alone; places from num_top on too.

Legend: S rows, V vocabulary, C chunks of a row, N most tokens listed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, pdl_options, start_next, wait_for_previous
from duomo_kernels._sampling import LOG2_E, MAX_VOCAB, from_order, order

CHUNK = 2048  # as sample's: one row of 151,936 on 75 multiprocessors
MAX_TOP = 20
LAST = tl.constexpr(-(1 << 63))
LN_2 = tl.constexpr(0.6931471805599453)


def token_logprobs_reference(logits_SV: Tensor, token_S: Tensor, max_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_S, top_id_SN, top_logprob_SN) of every row in float64; a token below 0 has -inf."""
    logprob_SV = torch.log_softmax(logits_SV.double(), -1)
    top_id_SN = torch.sort(logits_SV.double(), dim=-1, descending=True, stable=True).indices[:, :max_top]
    chosen_S = logprob_SV.gather(1, token_S.long().clamp(min=0)[:, None])[:, 0]
    return torch.where(token_S >= 0, chosen_S, -torch.inf), top_id_SN.int(), logprob_SV.gather(1, top_id_SN)


@triton.jit
def _best_of_chunk(
    logits, num_tops, num_valid, sums, heads, vocab, num_chunks, num_listed,
    CHUNK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One chunk: sum of exp(x - its maximum), and its best tokens as (order of the logit, ~id) in one int64."""
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    chunk, row = tl.program_id(0), tl.program_id(1)
    if row >= tl.load(num_valid):
        return
    num_top = tl.minimum(tl.load(num_tops + row), num_listed)  # a larger one would write past its list
    if num_top < 0:
        return
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=-float("inf")).to(tl.float32)
    at = row * num_chunks + chunk
    maximum = tl.max(x, axis=0)
    unit = tl.where(maximum == -float("inf"), 0.0, maximum)
    tl.store(sums + at, tl.sum(tl.exp2((x - unit) * LOG2_E), axis=0))
    key = tl.where(ids < vocab, (order(x).to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64), LAST)
    i = tl.zeros((), tl.int32)
    # the first is listed whatever num_top: it names the chunk's maximum
    while (i < num_top) | (i == 0):
        best = tl.max(key, axis=0)
        tl.store(heads + at * num_listed + i, best)
        key = tl.where(key == best, LAST, key)
        i += 1


@triton.jit
def _merge(
    logits, token_ids, num_tops, num_valid, sums, heads, logprobs, top_ids, top_logprobs, vocab, num_chunks, num_listed, max_top,
    CHUNKS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One row: the sum over its chunks, then its best tokens in turn."""
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    row = tl.program_id(0)
    if row >= tl.load(num_valid):
        return
    num_top = tl.minimum(tl.load(num_tops + row), max_top)
    if num_top < 0:
        return
    c = tl.arange(0, CHUNKS)
    at_C = row * num_chunks + c
    head_C = tl.load(heads + at_C.to(tl.int64) * num_listed, mask=c < num_chunks, other=LAST)
    maximum_C = from_order((head_C >> 32).to(tl.int32))
    maximum_C = tl.where(head_C == LAST, -float("inf"), maximum_C)
    peak = from_order((tl.max(head_C, axis=0) >> 32).to(tl.int32))
    sum_C = tl.load(sums + at_C, mask=c < num_chunks, other=0.0)
    # a chunk without a finite logit weighs nothing; a row without one, or with a NaN, has NaN logprobs
    share_C = tl.where(maximum_C == -float("inf"), 0.0, tl.exp2((maximum_C - peak) * LOG2_E))
    whole = tl.log2(tl.sum(tl.where(share_C == 0, 0.0, sum_C * share_C), axis=0)) * LN_2
    token = tl.load(token_ids + row)
    x = tl.load(logits + row.to(tl.int64) * vocab + token, mask=(token >= 0) & (token < vocab), other=-float("inf")).to(tl.float32)
    tl.store(logprobs + row, (x - peak) - whole)
    taken_C = tl.zeros((CHUNKS,), tl.int64)
    i = tl.zeros((), tl.int32)
    while (i < num_top) & (i < vocab):
        best = tl.max(head_C, axis=0)
        tl.store(top_ids + row * max_top + i, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32))
        tl.store(top_logprobs + row * max_top + i, (from_order((best >> 32).to(tl.int32)) - peak) - whole)
        is_it = (head_C == best) & (c < num_chunks)
        taken_C += is_it.to(tl.int64)
        has_more = is_it & (taken_C < num_top)
        next_C = tl.load(heads + at_C.to(tl.int64) * num_listed + taken_C, mask=has_more, other=LAST)
        head_C = tl.where(is_it, next_C, head_C)
        i += 1


def token_logprobs(
    logits_SV: Tensor,
    token_S: Tensor,
    num_top_S: Tensor,
    num_valid: Tensor,
    max_top: int,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob_S float32, top_id_SN int32, top_logprob_SN float32) of raw logits (float32 or bf16). Allocates them unless `out` is given.

    num_top_S int32: how many of the likeliest a row lists, cut to max_top (which is at most 20); 0: only its token's logprob; below 0:
    nothing. num_valid int32 [1]. A token below 0 (sample's answer to a row that has none) has -inf.
    """
    num_rows, vocab = logits_SV.shape
    device = logits_SV.device
    assert logits_SV.dtype in (torch.float32, torch.bfloat16) and 0 < vocab <= MAX_VOCAB and num_rows < 1 << 16, logits_SV.shape
    assert 0 <= max_top <= MAX_TOP, max_top
    check("logits_SV", logits_SV, logits_SV.dtype, num_rows, vocab)
    check("token_S", token_S, torch.int32, num_rows, device=device)
    check("num_top_S", num_top_S, torch.int32, num_rows, device=device)
    check("num_valid", num_valid, torch.int32, 1, device=device)
    if out is None:
        logprob_S = torch.empty(num_rows, dtype=torch.float32, device=device)
        top_id_SN = torch.empty(num_rows, max_top, dtype=torch.int32, device=device)
        out = (logprob_S, top_id_SN, torch.empty(num_rows, max_top, dtype=torch.float32, device=device))
    logprob_S, top_id_SN, top_logprob_SN = out
    check("logprob_S", logprob_S, torch.float32, num_rows, device=device)
    check("top_id_SN", top_id_SN, torch.int32, num_rows, max_top, device=device)
    check("top_logprob_SN", top_logprob_SN, torch.float32, num_rows, max_top, device=device)
    if num_rows == 0:
        return out
    num_chunks, num_listed = triton.cdiv(vocab, CHUNK), max(max_top, 1)
    sums_SC = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device)
    heads_SCN = torch.empty(num_rows, num_chunks, num_listed, dtype=torch.int64, device=device)
    pdl = pdl_options(device)
    _best_of_chunk[(num_chunks, num_rows)](
        logits_SV, num_top_S, num_valid, sums_SC, heads_SCN, vocab, num_chunks, num_listed, CHUNK=CHUNK, num_warps=4, **pdl,
    )  # fmt: skip
    _merge[(num_rows,)](
        logits_SV, token_S, num_top_S, num_valid, sums_SC, heads_SCN, logprob_S, top_id_SN, top_logprob_SN, vocab, num_chunks, num_listed,
        max_top, CHUNKS=triton.next_power_of_2(num_chunks), num_warps=4, **pdl,
    )  # fmt: skip
    return out
