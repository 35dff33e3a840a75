"""Owns how the programs of one kernel show each other their histograms, packed in words, on a board (_grid_board). Knows no choice.

A warp holds a row of C columns, S successive ones in a word, so that what programs count is a sum of words. A byte holds a count below 128
and, on top, the launch's tag.

Legend: T rows of one program; C columns = W * S, W words, one a lane up to 256 columns; P programs, a power of two, read as A runs of G, of
which a warp adds up one in registers: G * T <= 255, so that a byte holds the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

COUNTS = tl.constexpr(0x7F7F7F7F7F7F7F7F)
PAIRS = tl.constexpr(0x00FF00FF00FF00FF)
ONES = tl.constexpr(0x0101010101010101)


def board_dtype(columns: int) -> torch.dtype:
    """A word: the 1, 2, 4 or 8 columns of a lane, or half of its 16."""
    return {32: torch.uint8, 64: torch.int16, 128: torch.int32}.get(columns, torch.int64)


@triton.jit
def _wide(x, S: tl.constexpr):
    """In the type that words are computed in."""
    return x.to(tl.int64) if S == 8 else x.to(tl.int32)


@triton.jit
def own_tag(board_ptr, program, W: tl.constexpr, S: tl.constexpr):
    """(the bits that mark this launch's words, true): not those of the last launch on the same board, which this program's own row tells.

    That no count is 127 the compiler does not know: what hangs on the second value keeps the load beside those before it.
    """
    word = _wide(tl.load(board_ptr + program * W, volatile=True), S)
    return ((word & 128) ^ 128) * (ONES >> (64 - 8 * S)), (word & 127) != 127


@triton.jit
def packed(counted_TC, T: tl.constexpr, W: tl.constexpr, S: tl.constexpr):
    """[T, C] of zeros and ones -> words [T, W]: column w * S + s is byte s of word w."""
    shift_S = (tl.arange(0, S) * 8)[None, None, :]
    return tl.sum(_wide(tl.reshape(counted_TC, (T, W, S)), S) << shift_S, 2)


@triton.jit
def halves(word_X, S: tl.constexpr):
    """(columns 0, 2, .. of words, columns 1, 3, ..), 16 bits each instead of 8."""
    EVEN: tl.constexpr = PAIRS >> (64 - 8 * S) if S > 1 else 255
    return word_X & EVEN, (word_X >> 8) & EVEN


@triton.jit
def column_of(even_X, odd_X, s: tl.constexpr):
    """Column s of words in halves."""
    return (((odd_X if s % 2 == 1 else even_X) >> (s // 2 * 16)) & 0xFFFF).to(tl.int32)


@triton.jit
def publish(board_ptr, word_TW, tag, program, T: tl.constexpr, W: tl.constexpr):
    """Write this program's histogram, the sum of its rows' words, with the tag.

    The tag goes in before the sum, so that every thread has read it before the sum's barrier, and none writes over it before that.
    """
    t = tl.arange(0, T)[:, None]
    total_W = tl.sum(word_TW + tl.where(t == 0, tag, 0), 0)
    at_TW = tl.multiple_of(program * W + tl.arange(0, W)[None, :] + t * 0, (1, 1))  # as the rows' words lie: nothing moves
    total_TW = tl.broadcast_to(total_W[None, :], (T, W)).to(board_ptr.dtype.element_ty)
    tl.store(board_ptr + at_TW, total_TW, mask=tl.broadcast_to(t == 0, (T, W)))


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _sum_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sum_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _words(at_AGW, is_there_AGW, tag, S: tl.constexpr):
    """All programs' words without the tag: a byte whose top bit is set has not come."""
    return _wide(tl.load(at_AGW, mask=is_there_AGW, other=tag.to(at_AGW.dtype.element_ty), volatile=True), S) ^ tag


@triton.jit
def _is_missing(word_AGW, S: tl.constexpr):
    tags_AW = (tl.reduce(word_AGW, 1, _either) >> 7) & (ONES >> (64 - 8 * S))
    if S == 8:  # a maximum of int32 is one instruction a warp
        tags_AW = (tags_AW | (tags_AW >> 32)).to(tl.int32)
    return tl.reduce(tags_AW, None, _either) != 0


@triton.jit
def exchanged(
    board_ptr, tag, program, num_programs, P: tl.constexpr, G: tl.constexpr, T: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Halves of words [T, W], all rows alike, once all words carry the tag: of the counts of all programs (even, odd), and of those before.

    Read one word a lane (said to be a multiple of no more), whole rows a warp, as the rows' own words lie: nothing moves between lanes.
    """
    A: tl.constexpr = P // G
    a, g = tl.arange(0, A)[:, None, None], tl.arange(0, G)[None, :, None]
    w = tl.arange(0, W)[None, None, :]
    at_AGW = (board_ptr + tl.multiple_of(a * (G * W) + w, (1, 1, 1))) + g * W
    is_there_AGW = tl.broadcast_to(a * G + g < num_programs, (A, G, W))
    word_AGW = _words(at_AGW, is_there_AGW, tag, S)
    if WAITS:
        while _is_missing(word_AGW, S):
            word_AGW = _words(at_AGW, is_there_AGW, tag, S)
    word_AGW = word_AGW & (COUNTS >> (64 - 8 * S))
    total_AW = tl.sum(word_AGW, 1)
    before_AW = tl.sum(tl.where(a * G + g < program, word_AGW, 0), 1)
    even_AW, odd_AW = halves(total_AW, S)
    even_before_AW, odd_before_AW = halves(before_AW, S)
    if S > 2:
        even_W, odd_W, even_before_W, odd_before_W = tl.reduce((even_AW, odd_AW, even_before_AW, odd_before_AW), 0, _sum_four)
    else:  # only the low halves are in use
        even_W, odd_W = tl.reduce((even_AW | (even_before_AW << 16), odd_AW | (odd_before_AW << 16)), 0, _sum_two)
        even_before_W, odd_before_W = even_W >> 16, odd_W >> 16
    even_TW, odd_TW = tl.broadcast_to(even_W[None, :], (T, W)), tl.broadcast_to(odd_W[None, :], (T, W))
    return even_TW, odd_TW, tl.broadcast_to(even_before_W[None, :], (T, W)), tl.broadcast_to(odd_before_W[None, :], (T, W))
