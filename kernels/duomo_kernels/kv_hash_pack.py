"""Owns the GPU's gather of KV blocks into a message and back, hashed in the same pass. Knows no ring, no slot and no wire.

    message  [payload][padding to 64 bytes][trailer: start (32 bytes), hash, zeros; 64 bytes in all]       in 64-bit words, little-endian
    payload  [layer][block][k, v][kv head][block token][head dim]: every block of every layer whole, L layers of n blocks of W words;
             of a pool cut to some heads (cut_to_heads): of every block two runs of R words, from its k and from its v

    hash of the payload's words w_i, i = c * 8192 + j, modulo 2^64, as the CPU's peer computes it:
        g(w) = y xor (y >> 32), y = w * M         K_c = splitmix64(2^63 + c) | 1         k_j = splitmix64(j) | 1
        hash = splitmix64(sum over i of K_c * k_j * g(w_i) + nonce)           nonce: splitmix64 folded over whose message it is, and length

The sum commutes, and integer addition is exact: programs add their parts in any order and the hash has the same bits every time. A program
strides over whole chunks, so that its words' keys k_j are the same in every round: it sums K_c * g(w) and multiplies by k_j last. The last
program to finish seals the message (pack) or compares (scatter) and leaves the scratch zeroed for the next launch.

Scatter writes blocks while it hashes, so a corrupt message is written too: nothing may read those blocks unless the flag says GOOD.
Bytes: 2 n L W words of 8 (cut: 4 n L R): each read once and written once.

Legend: L layers, B blocks of the pool, W words of a block, R words of a run, n blocks of the message, M words of the message's memory.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous

GOOD, CORRUPT = 1, 2
START_BYTES = 32
_TRAILER_WORDS = 8
_ALIGNMENT_WORDS = 8
_MASK = (1 << 64) - 1
_CHUNK = tl.constexpr(8192)
_GAMMA = tl.constexpr(0x9E37_79B9_7F4A_7C15)  # splitmix64's step, and M
_MIX_A = tl.constexpr(0xBF58_476D_1CE4_E5B9)
_MIX_B = tl.constexpr(0x94D0_49BB_1331_11EB)
_CHUNK_KEYS = tl.constexpr(1 << 63)
# 8 KiB a program: four 16-byte loads a thread in flight with 4 warps.
_TILE = 1024
# Programs a multiprocessor at most: 48 KiB of it in flight, and few enough that their two atomic additions do not queue.
_PROGRAMS_PER_SM = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class Seal:
    """Whose message it is. start: the 32 bytes before the hash in its trailer, known to both peers in advance."""

    handle_id: int
    group: int
    message_idx: int
    start: bytes

    def nonce(self, num_bytes: int) -> int:
        """What binds the hash to this message and its length."""
        nonce = 0
        for part in (self.handle_id, self.group, self.message_idx, num_bytes):
            nonce = splitmix64(nonce ^ part)
        return nonce


def splitmix64(value: int) -> int:
    """The splitmix64 finaliser (Steele, Lea, Flood 2014)."""
    z = (value + 0x9E37_79B9_7F4A_7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


def trailer_word(num_words: int) -> int:
    """The word at which the trailer of a payload of num_words starts."""
    return -(-num_words // _ALIGNMENT_WORDS) * _ALIGNMENT_WORDS


def cut_to_heads(pool_LBW: Tensor, heads: range, num_heads: int) -> Tensor:
    """The view [L, B, 2, R] of the k and v of some of num_heads kv heads, or the pool itself where that is all of them."""
    num_layers, num_blocks, width = pool_LBW.shape
    assert width % (2 * num_heads) == 0, f"a block of {width} words is not k and v of {num_heads} heads"
    assert heads.step == 1 and 0 <= heads.start < heads.stop <= num_heads, (heads, num_heads)
    head_words = width // (2 * num_heads)
    cut_LB2R = pool_LBW.view(num_layers, num_blocks, 2, -1)[..., heads.start * head_words : heads.stop * head_words]
    return pool_LBW if len(heads) == num_heads else cut_LB2R


def kv_hash_pack_reference(pool_LBW: Tensor, layers: range, ids_n: Tensor, seal: Seal) -> tuple[Tensor, int]:
    """The payload's words, block by block, and the message's hash, word by word in Python. The pool may be cut_to_heads()."""
    words_M = torch.cat([pool_LBW[layer, block].flatten() for layer in layers for block in ids_n.tolist()]).cpu()
    total = 0
    for i, word in enumerate(words_M.tolist()):
        y = (word * 0x9E37_79B9_7F4A_7C15) & _MASK
        chunk, j = divmod(i, 8192)
        total += (splitmix64((1 << 63) + chunk) | 1) * (splitmix64(j) | 1) * (y ^ (y >> 32))
    return words_M, splitmix64((total + seal.nonce(8 * len(words_M))) & _MASK)


@triton.jit
def mixed64(value):
    """splitmix64 of each."""
    z = value + _GAMMA
    z = (z ^ (z >> 30)) * _MIX_A
    z = (z ^ (z >> 27)) * _MIX_B
    return z ^ (z >> 31)


@triton.jit
def chunk_key(index):
    """K_c of the word at this place of the payload."""
    return mixed64((index // _CHUNK).to(tl.uint64) + _CHUNK_KEYS) | 1


@triton.jit
def word_key(index):
    """k_j of the word at this place of the payload."""
    return mixed64((index % _CHUNK).to(tl.uint64)) | 1


@triton.jit
def mix(word):
    """g of an int64 word."""
    y = word.to(tl.uint64, bitcast=True) * _GAMMA
    return y ^ (y >> 32)


@triton.jit
def _seal(message_ptr, flag_ptr, digest, start_0, start_1, start_2, start_3, trailer_at, PACK: tl.constexpr):
    """Write the trailer, or say whether it is what it should be."""
    at = tl.arange(0, 8)
    start = tl.where(at == 0, start_0, tl.where(at == 1, start_1, tl.where(at == 2, start_2, tl.where(at == 3, start_3, 0))))
    trailer = tl.where(at == 4, digest.to(tl.int64, bitcast=True), start)
    trailer_ptrs = message_ptr + trailer_at + at
    if PACK:
        tl.store(trailer_ptrs, trailer)
    else:
        is_wrong = (tl.load(trailer_ptrs) != trailer) & (at < 5)
        tl.store(flag_ptr, tl.where(tl.sum(is_wrong.to(tl.int32)) == 0, 1, 2))


@triton.jit
def add_and_seal(scratch_ptr, part, message_ptr, flag_ptr, start_0, start_1, start_2, start_3, nonce, trailer_at, PACK: tl.constexpr):
    """The end of every program: add its part of the sum; the last program seals or compares, and leaves the scratch zeroed."""
    tl.atomic_add(scratch_ptr, part.to(tl.int64, bitcast=True), sem="relaxed")
    # release: the part is there before the ticket; acquire: whoever draws the last ticket sees every part
    ticket = tl.atomic_add(scratch_ptr + 1, 1, sem="acq_rel")
    if ticket == tl.num_programs(0) - 1:
        total = tl.atomic_xchg(scratch_ptr, 0, sem="relaxed").to(tl.uint64, bitcast=True)
        tl.store(scratch_ptr + 1, 0)
        digest = mixed64(total + nonce.to(tl.uint64, bitcast=True))
        _seal(message_ptr, flag_ptr, digest, start_0, start_1, start_2, start_3, trailer_at, PACK)


@triton.jit(do_not_specialize=["first_layer", "num_ids", "num_tiles", "start_0", "start_1", "start_2", "start_3", "nonce", "trailer_at"])
def _move(
    pool_ptr,
    ids_ptr,
    message_ptr,
    scratch_ptr,
    flag_ptr,
    first_layer: tl.int32,
    num_ids: tl.int32,
    num_tiles: tl.int32,
    start_0: tl.int64,
    start_1: tl.int64,
    start_2: tl.int64,
    start_3: tl.int64,
    nonce: tl.int64,
    trailer_at: tl.int64,
    B: tl.constexpr,
    W: tl.constexpr,
    RUNS: tl.constexpr,
    R: tl.constexpr,
    TILE: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    PACK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    PARTS: tl.constexpr = (R + TILE - 1) // TILE
    wait_for_previous(USE_PDL)
    word = tl.arange(0, TILE)
    sums = tl.zeros([TILE], tl.uint64)
    tile = tl.program_id(0)
    while tile < num_tiles:
        run = tile // PARTS
        entry = run // RUNS  # layer * num_ids + place
        off = (tile % PARTS) * TILE + word
        block = tl.load(ids_ptr + entry % num_ids).to(tl.int64)
        half = run % RUNS * (W // RUNS)  # v lies half a block behind k
        pool_ptrs = pool_ptr + ((first_layer + entry // num_ids).to(tl.int64) * B + block) * W + half + off
        first = run.to(tl.int64) * R
        if IS_WHOLE:
            mask = None
        else:
            mask = off < R
        words = tl.load(pool_ptrs if PACK else message_ptr + (first + off), mask=mask)
        tl.store(message_ptr + (first + off) if PACK else pool_ptrs, words, mask=mask)
        if IS_WHOLE:  # one chunk a tile; the keys of its words are the same in every round
            sums += chunk_key(first + (tile % PARTS) * TILE) * mix(words)
        else:
            sums += tl.where(mask, chunk_key(first + off) * word_key(first + off) * mix(words), 0)
        tile += tl.num_programs(0)
    start_next(USE_PDL)
    if IS_WHOLE:
        sums *= word_key(tl.program_id(0) * TILE + word)
    add_and_seal(scratch_ptr, tl.sum(sums), message_ptr, flag_ptr, start_0, start_1, start_2, start_3, nonce, trailer_at, PACK)


def hash_scratch(device: torch.device) -> Tensor:
    """What one stream's launches share: int64 [2], zero between launches. Whoever owns the stream owns it."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def kv_hash_pack(pool_LBW: Tensor, layers: range, ids_n: Tensor, message_M: Tensor, seal: Seal, scratch: Tensor) -> None:
    """Gather the blocks of the layers into message_M (int64, payload and trailer) and seal it.

    pool_LBW: the cache's tensor as int64 words, or cut_to_heads() of it. ids_n int32 on the device, 0 <= id < B. message_M starts
    16-byte aligned; padding, where the payload is no multiple of 64 bytes, stays as it is.
    """
    _launch(pool_LBW, layers, ids_n, message_M, seal, scratch, scratch, is_pack=True)


def kv_verify_scatter(
    pool_LBW: Tensor, layers: range, ids_n: Tensor, message_M: Tensor, seal: Seal, scratch: Tensor, flag_1: Tensor
) -> None:
    """Write the payload into the blocks (distinct ids) and set flag_1 (int32 [1]) to GOOD, or CORRUPT where hash or trailer differ.

    Of a pool that is cut_to_heads() nothing but these heads is written.
    """
    check("flag_1", flag_1, torch.int32, 1, device=pool_LBW.device)
    _launch(pool_LBW, layers, ids_n, message_M, seal, scratch, flag_1, is_pack=False)


def _launch(
    pool_LBW: Tensor, layers: range, ids_n: Tensor, message_M: Tensor, seal: Seal, scratch: Tensor, flag_1: Tensor, *, is_pack: bool
) -> None:
    num_layers, num_blocks = pool_LBW.shape[:2]
    num_runs, run_words, width = _runs(pool_LBW)
    num_ids = ids_n.numel()
    num_words = len(layers) * num_ids * num_runs * run_words
    device = pool_LBW.device
    check("ids_n", ids_n, torch.int32, num_ids, device=device)
    check("message_M", message_M, torch.int64, None, device=device)
    check("scratch", scratch, torch.int64, 2, device=device)
    assert layers.step == 1 and 0 <= layers.start < layers.stop <= num_layers and num_ids, (layers, num_ids)
    assert message_M.numel() >= trailer_word(num_words) + _TRAILER_WORDS, (message_M.numel(), num_words)
    assert len(seal.start) == START_BYTES, len(seal.start)
    tile, is_whole = _tile(run_words)
    num_tiles = len(layers) * num_ids * num_runs * triton.cdiv(run_words, tile)
    assert num_tiles < 2**31, num_tiles
    per_chunk = _CHUNK.value // tile  # a stride of whole chunks: a program's words keep their keys k_j
    most = max(per_chunk, num_sms(device) * _PROGRAMS_PER_SM * _TILE // tile // per_chunk * per_chunk)
    starts = struct.unpack("<4q", seal.start)
    nonce = struct.unpack("<q", struct.pack("<Q", seal.nonce(8 * num_words)))[0]
    _move[(min(num_tiles, most),)](
        pool_LBW,
        ids_n,
        message_M,
        scratch,
        flag_1,
        layers.start,
        num_ids,
        num_tiles,
        *starts,
        nonce,
        trailer_word(num_words),
        B=num_blocks,
        W=width,
        RUNS=num_runs,
        R=run_words,
        TILE=tile,
        IS_WHOLE=is_whole,
        PACK=is_pack,
        num_warps=max(1, tile * 4 // _TILE),
        **pdl_options(device),
    )


def _runs(pool_LBW: Tensor) -> tuple[int, int, int]:
    """(runs of a block, words of a run, words of a block) of a whole pool or of one that is cut to heads."""
    if pool_LBW.ndim == 3:
        check("pool_LBW", pool_LBW, torch.int64, None, None, None)
        return 1, pool_LBW.shape[2], pool_LBW.shape[2]
    num_blocks, run_words, width = pool_LBW.shape[1], pool_LBW.shape[-1], pool_LBW.stride(1)
    strides = (num_blocks * width, width, width // 2, 1)
    is_cut = pool_LBW.dtype == torch.int64 and pool_LBW.stride() == strides and pool_LBW.shape[2] == 2 and 2 * run_words <= width
    assert is_cut, f"pool_LBW: {pool_LBW.dtype}, shape {tuple(pool_LBW.shape)}, strides {pool_LBW.stride()}, expected cut_to_heads()"
    return 2, run_words, width


def _tile(run_words: int) -> tuple[int, bool]:
    """(words of a tile, whether tiles are whole): the largest power of two that divides a run, where that is a tile worth having."""
    dividing = min(_TILE, run_words & -run_words)
    return (dividing, True) if dividing >= _TILE // 4 else (min(_TILE, triton.next_power_of_2(run_words)), False)
