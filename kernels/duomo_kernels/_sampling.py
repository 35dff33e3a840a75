"""Owns the tensors by which rows say how they draw, and the elementwise steps that the sampling kernels share. Knows no launch.

A row's logits x are masked and penalised as duomo.engine.sampler does it, in float32 and in its order; then, with p the row's largest
logit and s = log2(e) / temperature,

    depth d = (p - x) s >= 0            weight w = floor(2^44 2^-d)          share of a token = w / sum of w

Weights are integers, and so sums of them are exact in any order: no split of a row, no batch and no atomic can change a bit. A token
2^-44 as likely as the best weighs nothing; 2^18 tokens of weight 2^44 fit into 63 bits.

order(x) maps float32 to integers of the same order, -0 to 0's, NaN to the largest.

Legend: S rows, V vocabulary, L slots, W words of 32 ids, E ending ids, M masks, B biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check

MAX_VOCAB = 1 << 18
MAX_BIASES = tl.constexpr(1024)  # of one row: what the API takes
MAX_COUNT = tl.constexpr(32767)  # int16: a token's count stays there; by then any penalty has swamped it
GREEDY_TEMPERATURE = tl.constexpr(1e-5)  # as duomo.engine.sampler: below, dividing by it overflows
LOG2_E = tl.constexpr(1.4426950408889634)
ONE = tl.constexpr(float(1 << 44))  # weight of the likeliest token
DEEPEST = tl.constexpr(43.0)  # of a row with limits: one bit spare, so that whatever is kept weighs at least 1
NAN_ORDER = tl.constexpr(0x7FFFFFFF)

NAN_FLAG = tl.constexpr(1)
INFINITE_FLAG = tl.constexpr(2)  # the largest logit is infinite: of either sign (all are masked)
MODE_FLAG = tl.constexpr(4)  # the row asks for what the launch was told that no row would
LOST_FLAG = tl.constexpr(8)  # logits changed between the kernels of a launch


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRows:
    """How each row draws; all [S] and on the device. temperature, top_p, min_p float32; top_k, choice, position int32; seed int64.

    temperature below 1e-5 is greedy; top_k 0, top_p 1 and min_p 0 are off. seed holds the low 64 bits. position: the new token's place in
    prompt + output. num_valid int32 [1]: rows from there on are padding.
    """

    temperature_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    min_p_S: Tensor
    seed_S: Tensor
    choice_S: Tensor
    position_S: Tensor
    num_valid: Tensor

    def check(self, rows: int, device: torch.device) -> None:
        for name in ("temperature_S", "top_p_S", "min_p_S"):
            check(name, getattr(self, name), torch.float32, rows, device=device)
        for name in ("top_k_S", "choice_S", "position_S"):
            check(name, getattr(self, name), torch.int32, rows, device=device)
        check("seed_S", self.seed_S, torch.int64, rows, device=device)
        check("num_valid", self.num_valid, torch.int32, 1, device=device)

    def arguments(self) -> tuple[Tensor, ...]:
        """As the kernels unpack them."""
        rows = (self.temperature_S, self.top_k_S, self.top_p_S, self.min_p_S, self.seed_S, self.choice_S, self.position_S)
        return (*rows, self.num_valid)


@dataclass(frozen=True, kw_only=True, slots=True)
class Penalties:
    """Biases, masks and penalties of the rows, and the tables of tokens seen. Whoever schedules owns the slots: it fills one when a request
    with a penalty or a bias joins and hands its number to the row; sampling adds each token that it emits to the row's slot.

    repetition_S, frequency_S, presence_S float32 (1, 0, 0 are off); slot_S int32, -1: no penalty, no bias, no table;
    ending_ids_SE int32, -1 padded, masked while position < min_position_S int32 (prompt + min_tokens).
    prompt_bits_LW int32: bit v % 32 of word v // 32; output_counts_LV int16, saturating.
    mask_S int32: the row of mask_bits_MW (int32, bits as above) that says which ids may come, -1: all may.
    num_biases_S int32: how many of bias_ids_LB (int32) and bias_LB (float32) of its slot are added to its logits, before all else.
    """

    repetition_S: Tensor
    frequency_S: Tensor
    presence_S: Tensor
    slot_S: Tensor
    ending_ids_SE: Tensor
    min_position_S: Tensor
    prompt_bits_LW: Tensor
    output_counts_LV: Tensor
    mask_S: Tensor
    mask_bits_MW: Tensor
    num_biases_S: Tensor
    bias_ids_LB: Tensor
    bias_LB: Tensor

    def check(self, rows: int, vocab: int, device: torch.device) -> None:
        for name in ("repetition_S", "frequency_S", "presence_S"):
            check(name, getattr(self, name), torch.float32, rows, device=device)
        for name in ("slot_S", "min_position_S", "mask_S", "num_biases_S"):
            check(name, getattr(self, name), torch.int32, rows, device=device)
        check("ending_ids_SE", self.ending_ids_SE, torch.int32, rows, None, device=device)
        slots = self.output_counts_LV.shape[0]
        check("output_counts_LV", self.output_counts_LV, torch.int16, slots, vocab, device=device)
        check("prompt_bits_LW", self.prompt_bits_LW, torch.int32, slots, num_words(vocab), device=device)
        check("mask_bits_MW", self.mask_bits_MW, torch.int32, None, num_words(vocab), device=device)
        check("bias_ids_LB", self.bias_ids_LB, torch.int32, slots, MAX_BIASES.value, device=device)
        check("bias_LB", self.bias_LB, torch.float32, slots, MAX_BIASES.value, device=device)

    def arguments(self) -> tuple[Tensor, ...]:
        """As the kernels unpack them."""
        rows = (self.repetition_S, self.frequency_S, self.presence_S, self.slot_S, self.ending_ids_SE, self.min_position_S)
        tables = (self.prompt_bits_LW, self.output_counts_LV, self.mask_S, self.mask_bits_MW)
        return (*rows, *tables, self.num_biases_S, self.bias_ids_LB, self.bias_LB)


def num_words(vocab: int) -> int:
    return (vocab + 31) // 32


def empty_tables(slots: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """prompt_bits_LW and output_counts_LV of requests that have seen nothing."""
    bits_LW = torch.zeros(slots, num_words(vocab), dtype=torch.int32, device=device)
    return bits_LW, torch.zeros(slots, vocab, dtype=torch.int16, device=device)


def empty_masks(masks: int, vocab: int, device: torch.device) -> Tensor:
    """mask_bits_MW in which nothing may come: to be filled before a row names one."""
    return torch.zeros(masks, num_words(vocab), dtype=torch.int32, device=device)


def empty_biases(slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """bias_ids_LB and bias_LB, of which no row uses any yet."""
    ids_LB = torch.zeros(slots, MAX_BIASES.value, dtype=torch.int32, device=device)
    return ids_LB, torch.zeros(slots, MAX_BIASES.value, dtype=torch.float32, device=device)


def fill_slot(bits_W: Tensor, counts_V: Tensor, prompt_ids: Tensor, output_ids: Tensor) -> None:
    """Write one slot's tables from int64 ids on the device; what was there is forgotten. Plain torch: once a request, outside a graph."""
    vocab = counts_V.shape[0]
    seen_B = torch.zeros(bits_W.shape[0] * 32, dtype=torch.int64, device=bits_W.device).index_fill_(0, prompt_ids, 1)
    words_W = (seen_B.view(-1, 32) << torch.arange(32, device=bits_W.device)).sum(-1)
    bits_W.copy_(torch.where(words_W >= 1 << 31, words_W - (1 << 32), words_W))
    count_V = torch.zeros(vocab, dtype=torch.int32, device=bits_W.device).index_add_(0, output_ids, torch.ones_like(output_ids).int())
    counts_V.copy_(count_V.clamp(max=MAX_COUNT.value))  # bincount would wait for the device


@triton.jit
def order(x):
    """int32 of the same order as float32 x."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_ORDER, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def from_order(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def weigh(depth):
    """int64; depth >= 0, infinity weighs nothing."""
    return (tl.exp2(-depth) * ONE).to(tl.int64)


@triton.jit
def adjusted(source, row, ids, ENDINGS: tl.constexpr, PENALISED: tl.constexpr):
    """float32 logits of `ids` of one row after biases, masks and penalties; -inf outside the vocabulary."""
    logits, vocab, positions, penalties = source
    row = row.to(tl.int64)
    inside = ids < vocab
    x = tl.load(logits + row * vocab + ids, mask=inside, other=-float("inf")).to(tl.float32)
    if PENALISED:
        (
            repetitions, frequencies, presences, slots, endings, min_positions, prompt_bits, output_counts,
            masks, mask_bits, num_biases, bias_ids, biases,
        ) = penalties  # fmt: skip
        slot = tl.load(slots + row).to(tl.int64)
        for bias in range(tl.load(num_biases + row)):
            at = slot * MAX_BIASES + bias
            x = tl.where(ids == tl.load(bias_ids + at), x + tl.load(biases + at), x)
        if tl.load(positions + row) < tl.load(min_positions + row):
            for i in tl.static_range(ENDINGS):
                x = tl.where(ids == tl.load(endings + row * ENDINGS + i), -float("inf"), x)
        mask = tl.load(masks + row).to(tl.int64)
        if mask >= 0:
            may = tl.load(mask_bits + mask * ((vocab + 31) // 32) + ids // 32, mask=inside, other=0)
            x = tl.where(((may >> (ids % 32)) & 1) != 0, x, -float("inf"))
        if slot >= 0:
            words = tl.load(prompt_bits + slot * ((vocab + 31) // 32) + ids // 32, mask=inside, other=0)
            count = tl.load(output_counts + slot * vocab + ids, mask=inside, other=0).to(tl.float32)
            repetition = tl.load(repetitions + row)
            seen = (((words >> (ids % 32)) & 1) != 0) | (count > 0)
            x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
            x = x - tl.load(frequencies + row) * count
            x = x - tl.where(count > 0, tl.load(presences + row), 0.0)
    return x


@triton.jit
def row_limits(draw, row, vocab):
    """(is greedy, log2(e) / temperature, top_k or 0, top_p, min_p, the depth within which tokens are kept) of a row."""
    temperatures, top_ks, top_ps, min_ps, seeds, choices, positions, num_valid = draw
    temperature = tl.load(temperatures + row)
    is_greedy = temperature < GREEDY_TEMPERATURE
    scale = tl.div_rn(LOG2_E, tl.where(is_greedy, 1.0, temperature))
    top_k = tl.load(top_ks + row)
    top_k = tl.where(top_k < vocab, tl.maximum(top_k, 0), 0)
    min_p = tl.load(min_ps + row)
    reach = tl.where(min_p > 0, tl.minimum(tl.maximum(-tl.log2(tl.maximum(min_p, 1e-30)), 0.0), DEEPEST), DEEPEST)
    return is_greedy, scale, top_k, tl.load(top_ps + row), min_p, reach


@triton.jit
def row_peak(maxima, sums, row, scale, num_chunks, CHUNKS: tl.constexpr):
    """(largest logit, flag, sum of all weights in units of the largest) from the chunks' summaries."""
    c = tl.arange(0, CHUNKS)
    maximum_C = tl.load(maxima + row * num_chunks + c, mask=c < num_chunks, other=-float("inf"))
    has_nan = tl.max((maximum_C != maximum_C).to(tl.int32), axis=0) != 0
    peak = tl.max(tl.where(maximum_C != maximum_C, -float("inf"), maximum_C), axis=0)
    flag = tl.where(has_nan, NAN_FLAG, tl.where(tl.abs(peak) == float("inf"), INFINITE_FLAG, 0))
    sum_C = tl.load(sums + row * num_chunks + c, mask=c < num_chunks, other=0).to(tl.float32)
    share_C = tl.where(maximum_C > -float("inf"), tl.exp2((maximum_C - peak) * scale), 0.0)
    return peak, flag, tl.sum(sum_C * share_C, axis=0) * (1.0 / ONE)


@triton.jit
def _mix(state):
    """SplitMix64's finaliser."""
    state = state + tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    state = (state ^ (state >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    state = (state ^ (state >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return state ^ (state >> 31)


@triton.jit
def draw_below(draw, row, total):
    """floor(u * total), u the 53 bits of duomo.engine.randomness.uniform(seed, choice, position): the product is exact."""
    temperatures, top_ks, top_ps, min_ps, seeds, choices, positions, num_valid = draw
    state = _mix(tl.load(seeds + row).to(tl.uint64))
    state = _mix(state + tl.load(choices + row).to(tl.uint64))
    state = _mix(state + tl.load(positions + row).to(tl.uint64))
    return tl.umulhi((state >> 11) << 11, total.to(tl.uint64)).to(tl.int64)
