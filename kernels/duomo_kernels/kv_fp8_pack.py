"""Owns the GPU's gather of KV blocks into a message in fp8 and back, hashed in the same pass. Knows no ring, no slot and no wire.

    message  [payload][padding to 64 bytes][trailer]            in 64-bit words, little-endian: sealed and hashed as kv_hash_pack.py says
    payload  [codes: N rows of D / 8 words][exponents: N / 8 words]             as kv_rows_fp8.py says, byte for byte
    rows     [layer][block][k, v][kv head][block token]: N = n L R

A program takes ROWS rows of one block at a time: it finds each row's largest number, rounds to e4m3, forms the words of the codes and
hashes them while the rows are in registers, so that the pool is read once. As in kv_hash_pack.py it strides over whole chunks where it can,
so that these words' keys k_j are the same in every round. Exponents it hashes last, all at once: a word of them comes from eight rows, and
so from several warps, which would wait for each other in every round. Everything but the rounding is exact (scales are powers of two), and
the sum of the hash commutes: the bytes are the CPU's, and the same every time.

Land writes blocks while it hashes, so a corrupt message is written too: nothing may read those blocks unless the flag says GOOD. It
writes them in its own pool's dtype, whatever that of the pool was which they come from.
Bytes: N (D + 1) of the payload and N D elements of the pool, once each.

Legend: L layers, B blocks of the pool, R rows of a block, D head dim, n blocks of the message, M words of the message's memory.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous
from duomo_kernels.kv_hash_pack import START_BYTES, Seal, add_and_seal, chunk_key, kv_hash_pack_reference, mix, trailer_word, word_key
from duomo_kernels.kv_rows_fp8 import kv_rows_fp8_reference, packed_bytes

_TRAILER_WORDS = 8
_CHUNK = 8192
# Numbers a program takes at a time: 32 a thread of four warps, in 16-bit pools four 16-byte loads in flight.
_TILE = 4096
# Programs a multiprocessor at most, as in kv_hash_pack.py.
_PROGRAMS_PER_SM = 6


def kv_fp8_pack_reference(pool_LBRD: Tensor, layers: range, ids_n: Tensor, seal: Seal) -> tuple[Tensor, int]:
    """The payload's words, row by row, and the message's hash, word by word in Python."""
    rows_ND = torch.cat([pool_LBRD[layer, block] for layer in layers for block in ids_n.tolist()])
    words_M = kv_rows_fp8_reference(rows_ND).view(torch.int64)
    return kv_hash_pack_reference(words_M.view(1, 1, -1), range(1), torch.zeros(1, dtype=torch.int32), seal)


@triton.jit
def _e4m3_codes(x):
    """float32 of at most 448 to e4m3's bytes (uint8), to nearest even, by integers: 3 bits of significand, or multiples of 2^-9 below the
    smallest normal, 2^-6. The card's own conversion wrote bytes 2 and 3 of every 8 wrong here (bench/results/kv_fp8_pack_h100.txt)."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # exponent and significand, less 8 * (127 - 7)
    subnormal = ((tl.abs(x) + 16384.0).to(tl.int32, bitcast=True)) - 0x46800000  # 2^14: its last place is worth 2^-9
    codes = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return (codes | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _words(bytes_NC, N: tl.constexpr, C: tl.constexpr):
    """Every 8 successive bytes [N, C] as one little-endian word, int64 [N, C / 8]."""
    lanes = tl.reshape(bytes_NC, (N, C // 8, 8)).to(tl.int64)
    return tl.sum(lanes << (8 * tl.arange(0, 8)).to(tl.int64)[None, None, :], axis=2)


@triton.jit
def _exponents_part(
    message_ptr, exponents_at, num_tiles, R: tl.constexpr, PARTS: tl.constexpr, TILE_WORDS: tl.constexpr, LANES: tl.constexpr
):
    """What the words of exponents of this program's tiles add to the hash. They lie in the message."""
    lane_L = tl.arange(0, LANES)
    sums_L = tl.zeros([LANES], tl.uint64)
    first = tl.program_id(0)  # tile of the first lane
    while first < num_tiles:
        tile_L = first + (lane_L // TILE_WORDS) * tl.num_programs(0)
        in_block_L = (tile_L % PARTS) * TILE_WORDS + lane_L % TILE_WORDS
        at_L = exponents_at + (tile_L // PARTS).to(tl.int64) * (R // 8) + in_block_L
        mask = (tile_L < num_tiles) & (in_block_L < R // 8)
        # .cg: other multiprocessors write other bytes of the same cache line
        words_L = tl.load(message_ptr + at_L, mask=mask, other=0, cache_modifier=".cg")  # zeros add nothing
        sums_L += chunk_key(at_L) * word_key(at_L) * mix(words_L)
        first += (LANES // TILE_WORDS) * tl.num_programs(0)
    return tl.sum(sums_L)


@triton.jit(
    do_not_specialize=[
        "first_layer",
        "num_ids",
        "num_tiles",
        "exponents_at",
        "start_0",
        "start_1",
        "start_2",
        "start_3",
        "nonce",
        "trailer_at",
    ]
)
def _move_rows(
    pool_ptr,
    ids_ptr,
    message_ptr,
    bytes_ptr,
    scratch_ptr,
    flag_ptr,
    first_layer: tl.int32,
    num_ids: tl.int32,
    num_tiles: tl.int32,
    exponents_at: tl.int64,
    start_0: tl.int64,
    start_1: tl.int64,
    start_2: tl.int64,
    start_3: tl.int64,
    nonce: tl.int64,
    trailer_at: tl.int64,
    B: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
    LANES: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PACK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    PARTS: tl.constexpr = (R + ROWS - 1) // ROWS
    wait_for_previous(USE_PDL)
    d_D = tl.arange(0, BD)
    w_W = tl.arange(0, BD // 8)
    word_RW = tl.arange(0, ROWS)[:, None] * (D // 8) + w_W[None, :]
    sums_RW = tl.zeros([ROWS, BD // 8], tl.uint64)
    tile = tl.program_id(0)
    while tile < num_tiles:
        entry = tile // PARTS  # layer * num_ids + place
        row = (tile % PARTS) * ROWS
        block = tl.load(ids_ptr + entry % num_ids).to(tl.int64)
        r_R = row + tl.arange(0, ROWS)
        at_RD = r_R[:, None] * D + d_D[None, :]
        pool_ptrs = pool_ptr + ((first_layer + entry // num_ids).to(tl.int64) * B + block) * (R * D) + at_RD
        first_row = entry.to(tl.int64) * R  # of this block
        first = (first_row + row) * (D // 8)  # this tile's first word of codes
        codes_ptrs = bytes_ptr + first_row * D + at_RD
        exponents_ptrs = bytes_ptr + exponents_at * 8 + first_row + r_R
        if IS_WHOLE:
            mask = None
            word_mask = None
            row_mask = None
        else:
            mask = (r_R < R)[:, None] & (d_D < D)[None, :]
            word_mask = (r_R < R)[:, None] & (w_W < D // 8)[None, :]
            row_mask = r_R < R
        if PACK:
            x_RD = tl.load(pool_ptrs, mask=mask, other=None if IS_WHOLE else 0.0).to(tl.float32)
            # as integers a NaN is above infinity, infinity above every number
            top_R = tl.max(x_RD.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
            is_number_R = top_R < 0x7F800000
            # 0x1FFFFF carries into the exponent where the significand is above 1.75
            exponent_R = tl.where(is_number_R, tl.maximum(((top_R + 0x1FFFFF) >> 23) - 8, 10), 255)
            scaled_RD = x_RD * ((254 - exponent_R) << 23).to(tl.float32, bitcast=True)[:, None]
            codes_RD = _e4m3_codes(tl.where(is_number_R[:, None], scaled_RD, 0.0))
            # as bytes: stored as words, they would cross shared memory into another layout first
            tl.store(codes_ptrs, codes_RD, mask=mask)
            tl.store(exponents_ptrs, exponent_R.to(tl.uint8), mask=row_mask)
        else:
            codes_RD = tl.load(codes_ptrs, mask=mask, other=None if IS_WHOLE else 0)
            exponent_R = tl.load(exponents_ptrs, mask=row_mask, other=None if IS_WHOLE else 0).to(tl.int32)
            # of 255 this is infinity, and 0 times that is NaN
            scale_R = (exponent_R << 23).to(tl.float32, bitcast=True)
            x_RD = codes_RD.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale_R[:, None]
            tl.store(pool_ptrs, x_RD.to(pool_ptr.dtype.element_ty), mask=mask)
        words_RW = _words(codes_RD, ROWS, BD)
        if IS_WHOLE:  # one chunk a tile; the keys of its words are the same in every round
            sums_RW += chunk_key(first) * mix(words_RW)
        else:
            sums_RW += tl.where(word_mask, chunk_key(first + word_RW) * word_key(first + word_RW) * mix(words_RW), 0)
        tile += tl.num_programs(0)
    start_next(USE_PDL)
    if IS_WHOLE:
        sums_RW *= word_key(tl.program_id(0) * (ROWS * D // 8) + word_RW)
    if PACK:
        tl.debug_barrier()  # what this program's threads have written of exponents is there for all of them
    part = tl.sum(sums_RW) + _exponents_part(message_ptr, exponents_at, num_tiles, R, PARTS, ROWS // 8, LANES)
    add_and_seal(scratch_ptr, part, message_ptr, flag_ptr, start_0, start_1, start_2, start_3, nonce, trailer_at, PACK)


def kv_fp8_pack(pool_LBRD: Tensor, layers: range, ids_n: Tensor, message_M: Tensor, seal: Seal, scratch: Tensor) -> None:
    """Gather the blocks of the layers into message_M (int64, payload and trailer) as fp8 and seal it.

    pool_LBRD: the cache's tensor, bf16, fp16 or float32; R and D are multiples of 8. ids_n int32 on the device, 0 <= id < B. message_M
    starts 16-byte aligned; padding, where the payload is no multiple of 64 bytes, stays as it is. scratch: hash_scratch().
    """
    _launch(pool_LBRD, layers, ids_n, message_M, seal, scratch, scratch, is_pack=True)


def kv_fp8_land(pool_LBRD: Tensor, layers: range, ids_n: Tensor, message_M: Tensor, seal: Seal, scratch: Tensor, flag_1: Tensor) -> None:
    """Write the payload's numbers into the blocks (distinct ids) and set flag_1 (int32 [1]) to GOOD, or CORRUPT where hash or trailer
    differ."""
    check("flag_1", flag_1, torch.int32, 1, device=pool_LBRD.device)
    _launch(pool_LBRD, layers, ids_n, message_M, seal, scratch, flag_1, is_pack=False)


def _launch(
    pool_LBRD: Tensor, layers: range, ids_n: Tensor, message_M: Tensor, seal: Seal, scratch: Tensor, flag_1: Tensor, *, is_pack: bool
) -> None:
    num_layers, num_blocks, block_rows, head_dim = pool_LBRD.shape
    num_ids = ids_n.numel()
    num_rows = len(layers) * num_ids * block_rows
    num_words = packed_bytes(num_rows, head_dim) // 8
    device = pool_LBRD.device
    assert pool_LBRD.dtype in (torch.bfloat16, torch.float16, torch.float32), f"pool_LBRD: dtype {pool_LBRD.dtype}"
    check("pool_LBRD", pool_LBRD, pool_LBRD.dtype, None, None, None, None)
    assert block_rows % 8 == 0 and head_dim % 8 == 0, f"pool_LBRD: {block_rows} rows of {head_dim}, expected multiples of 8"
    check("ids_n", ids_n, torch.int32, num_ids, device=device)
    check("message_M", message_M, torch.int64, None, device=device)
    check("scratch", scratch, torch.int64, 2, device=device)
    assert layers.step == 1 and 0 <= layers.start < layers.stop <= num_layers and num_ids, (layers, num_ids)
    assert message_M.numel() >= trailer_word(num_words) + _TRAILER_WORDS, (message_M.numel(), num_words)
    assert len(seal.start) == START_BYTES, len(seal.start)
    tile_rows, is_whole = _tile_rows(block_rows, head_dim)
    num_tiles = len(layers) * num_ids * triton.cdiv(block_rows, tile_rows)
    assert num_tiles < 2**31, num_tiles
    tile = tile_rows * triton.next_power_of_2(head_dim)
    per_chunk = max(1, _CHUNK * 8 // tile)  # a stride of whole chunks: a program's words keep their keys k_j
    most = max(per_chunk, num_sms(device) * _PROGRAMS_PER_SM * _TILE // tile // per_chunk * per_chunk)
    num_warps = max(1, tile * 4 // _TILE)
    starts = struct.unpack("<4q", seal.start)
    nonce = struct.unpack("<q", struct.pack("<Q", seal.nonce(8 * num_words)))[0]
    _move_rows[(min(num_tiles, most),)](
        pool_LBRD,
        ids_n,
        message_M,
        message_M.view(torch.uint8),
        scratch,
        flag_1,
        layers.start,
        num_ids,
        num_tiles,
        num_rows * head_dim // 8,
        *starts,
        nonce,
        trailer_word(num_words),
        B=num_blocks,
        R=block_rows,
        D=head_dim,
        ROWS=tile_rows,
        BD=triton.next_power_of_2(head_dim),
        LANES=max(tile_rows // 8, 32 * num_warps),
        IS_WHOLE=is_whole,
        PACK=is_pack,
        num_warps=num_warps,
        **pdl_options(device),
    )


def _tile_rows(block_rows: int, head_dim: int) -> tuple[int, bool]:
    """(rows of a tile, whether tiles are whole): of a power of two of numbers that divides a block, where that is a tile worth having."""
    most = max(8, _TILE // triton.next_power_of_2(head_dim))
    dividing = min(most, block_rows & -block_rows)
    if head_dim & (head_dim - 1) == 0 and dividing * head_dim >= min(_TILE, block_rows * head_dim) // 4:
        return dividing, True
    return min(most, triton.next_power_of_2(block_rows)), False
