"""Owns causal attention over KV kept in blocks. Knows nothing of batches, sequences' names or who allocates blocks.

    out[t, h] = sum over j <= position(t) of softmax_j(q[t, h] . k[j, h / G] * scale) v[j, h / G]

The pool of one layer is [blocks, 2 (k, v), kv heads N, block tokens, head dim D]. Seen as rows [blocks * 2 * N, block tokens * D], a
sequence's keys and values come together by one gather of whole rows, already split by head.

Every row's bits are the same in a decode step, a prefill chunk, and beside any other sequence: products are row-exact (row_gemm.py), and
keys past the end carry weight exactly 0, which a softmax over whole multiples of BLOCK_LANES keys leaves exact (`prove_tail`).

Legend: S sequences, T tokens, H heads, N kv heads, G = H / N, L keys (a whole number of blocks), D head dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from duomo_kernels.row_gemm import RowGemm

CHUNK_QUERIES = 128  # positions whose scores exist at one time: 128 x 1,500 keys x 4 heads = 3 MB, about the L2 cache
BLOCK_LANES = 16  # widths of the softmax are multiples of this, the widest vector of float32


@dataclass(frozen=True, slots=True)
class KvShape:
    """Heads and block of one layer's pool."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """One query row for each of S sequences. gather [2 * S * N * blocks] rows of the pool, mask [S, 1, L] of 0 and -inf."""

    gather: Tensor
    mask_S1L: Tensor
    num_sequences: int


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Several successive query rows of one sequence, the first at position `start`; gather [2 * N * blocks] rows of the pool."""

    gather: Tensor
    start: int
    num_rows: int


def gather_index(block_table_SB: Tensor, num_kv_heads: int) -> Tensor:
    """Pool rows of keys then values: block_table [S, B] int64 -> [2 * S * N * B], in the order (k or v, sequence, head, block)."""
    head = torch.arange(num_kv_heads).view(1, 1, -1, 1)
    side = torch.arange(2).view(2, 1, 1, 1)
    return ((block_table_SB[None, :, None, :] * 2 + side) * num_kv_heads + head).flatten()


def length_mask(lengths: list[int], num_keys: int) -> Tensor:
    """[S, 1, L]: 0 where the key exists, -inf past the end."""
    beyond = torch.arange(num_keys)[None] >= torch.tensor(lengths)[:, None]
    return torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf).unsqueeze(1)


@functools.cache
def causal_mask() -> Tensor:
    """[CHUNK_QUERIES, CHUNK_QUERIES + BLOCK_LANES]: row i sees columns up to i. Made once a process."""
    return torch.full((CHUNK_QUERIES, CHUNK_QUERIES + BLOCK_LANES), -torch.inf).triu_(1)


def paged_attention_reference(q_THD: Tensor, pool: Tensor, block_table: list[int], start: int, scale: float) -> Tensor:
    """One sequence's T rows from position `start`, token by token, in float64. pool [blocks, 2, N, block tokens, D] -> [T, H, D]."""
    block_tokens, group = pool.shape[3], q_THD.shape[1] // pool.shape[2]
    out_THD = torch.empty_like(q_THD)
    for t in range(q_THD.shape[0]):
        kv = [pool[block_table[j // block_tokens], :, :, j % block_tokens] for j in range(start + t + 1)]
        keys_LND, values_LND = (torch.stack([pair[side] for pair in kv]).double() for side in (0, 1))
        for h in range(q_THD.shape[1]):
            weights = torch.softmax(keys_LND[:, h // group] @ q_THD[t, h].double() * scale, 0)
            out_THD[t, h] = (weights @ values_LND[:, h // group]).float()
    return out_THD


def decode_attention(gemm: RowGemm, q_SHD: Tensor, pool: Tensor, rows: DecodeRows, shape: KvShape) -> Tensor:
    """One row for each sequence. q [S, H, D], already scaled -> [S, H * D]."""
    num_sequences, num_n, dim = rows.num_sequences, shape.num_kv_heads, shape.head_dim
    group = shape.num_heads // num_n
    num_keys = rows.mask_S1L.shape[2]
    kv = pool.view(-1, shape.block_tokens * dim).index_select(0, rows.gather).view(2, num_sequences * num_n, num_keys, dim)
    q = q_SHD.reshape(num_sequences * num_n, group, dim)
    padded = max(group, gemm.min_score_rows)
    if padded != group:
        q = torch.nn.functional.pad(q, (0, 0, 0, padded - group))
    scores = gemm.scores(q, kv[0]).reshape(num_sequences, num_n * padded, num_keys)
    weights = torch.softmax(scores.add_(rows.mask_S1L), -1).view(num_sequences * num_n, padded, num_keys)
    return gemm.mix(weights, kv[1])[:, :group].reshape(num_sequences, -1)


def chunk_attention(gemm: RowGemm, q_THD: Tensor, pool: Tensor, rows: ChunkRows, shape: KvShape) -> Tensor:
    """Successive rows of one sequence, whose own keys are already in the pool. q [T, H, D], already scaled -> [T, H * D]."""
    num_n, dim, group = shape.num_kv_heads, shape.head_dim, shape.num_heads // shape.num_kv_heads
    kv = pool.view(-1, shape.block_tokens * dim).index_select(0, rows.gather).view(2, num_n, -1, dim)
    q_NTGD = q_THD.view(-1, num_n, group, dim).transpose(0, 1)
    out_TNGD = q_THD.new_empty(rows.num_rows, num_n, group, dim)
    for lo in range(0, rows.num_rows, CHUNK_QUERIES):
        hi = min(lo + CHUNK_QUERIES, rows.num_rows)
        first, num_keys = rows.start + lo, min(-(-(rows.start + hi) // BLOCK_LANES) * BLOCK_LANES, kv.shape[2])
        scores = gemm.scores(q_NTGD[:, lo:hi].reshape(num_n, -1, dim), kv[0, :, :num_keys]).contiguous()
        diagonal = scores.view(num_n, hi - lo, group, num_keys)[..., first:]
        diagonal += causal_mask()[: hi - lo, None, : num_keys - first]
        mixed = gemm.mix(torch.softmax(scores, -1), kv[1, :, :num_keys])
        out_TNGD[lo:hi] = mixed.view(num_n, hi - lo, group, dim).transpose(0, 1)
    return out_TNGD.view(rows.num_rows, -1)


def paged_attention(gemm: RowGemm, q_THD: Tensor, pool: Tensor, rows: DecodeRows | ChunkRows, shape: KvShape) -> Tensor:
    """Attention of the rows over one layer's pool. q [rows, H, D], already scaled -> [rows, H * D]."""
    if isinstance(rows, DecodeRows):
        return decode_attention(gemm, q_THD, pool, rows, shape)
    return chunk_attention(gemm, q_THD, pool, rows, shape)


@functools.cache
def prove_tail() -> bool:
    """Whether a softmax is the same bit for bit whatever -inf tail follows (whole multiples of BLOCK_LANES); cached for the process."""
    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(1)) * 4
    for num_keys in (1, 5, 16, 33, 100, 250, 777):
        first: Tensor | None = None
        for width in range(-(-num_keys // BLOCK_LANES) * BLOCK_LANES, 2049, 11 * BLOCK_LANES):
            padded = torch.full((8, width), -torch.inf)
            padded[:, :num_keys] = x[:, :num_keys]
            weights = torch.softmax(padded, -1)[:, :num_keys]
            first = weights if first is None else first
            if not torch.equal(weights, first):
                return False
    return True
