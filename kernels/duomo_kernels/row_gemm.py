"""Owns matrix products whose every row is bit for bit independent of the other rows. Knows nothing of models or batches.

    y[t, n] = sum over k of x[t, k] * w[k, n]                 x [T, K], w [K, N], y [T, N]

A BLAS picks its kernel by the number of rows, so that a token's result may depend on how many others share the batch. Two
ways to forbid that stand here, behind one class:

    chain   Where the BLAS computes each element as one chain of fused multiply-adds in ascending k for every number of rows that
            we use (MKL with AVX-512 does, up to K of about 384), any shape gives the same bits. `prove_chain` checks it
            against an exact emulation, once a process, on shapes like those used.
    tile    Elsewhere every product is cut into tiles of TILE_ROWS rows, and every call has the same shape.

In both, sums over more than CHUNK_K terms are cut into chunks of CHUNK_K, added in ascending order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 16
CHUNK_K = 256  # below MKL's own K blocking (between 300 and 512 here), and a multiple of every KV block size
MIN_ROWS = 2  # one row goes to gemv, whose order of summation differs
SCORE_ROWS = (4, 8, 16, 32)  # with the right side transposed MKL takes dot products for few rows: the smallest of these proven free of them


def row_gemm_reference(x_TK: Tensor, w_KN: Tensor) -> Tensor:
    """The chain itself: one fused multiply-add for each k, chunks added in order. float32 [T, K] x [K, N] -> [T, N]."""
    out_TN = torch.zeros(x_TK.shape[0], w_KN.shape[1])
    for k_lo in range(0, x_TK.shape[1], CHUNK_K):
        chunk_TN = torch.zeros_like(out_TN)
        for k in range(k_lo, min(k_lo + CHUNK_K, x_TK.shape[1])):
            # a float64 product of two float32 is exact: rounding the sum to float32 is a fused multiply-add, but for rare double rounding
            chunk_TN = (chunk_TN.double() + x_TK[:, k : k + 1].double() * w_KN[k : k + 1].double()).float()
        out_TN = chunk_TN if k_lo == 0 else out_TN + chunk_TN
    return out_TN


@dataclass(frozen=True, slots=True)
class RowGemm:
    """Row-exact products. is_chain: the chain is proven on this machine; otherwise tiles. min_score_rows: scores are padded to these."""

    is_chain: bool
    min_score_rows: int = TILE_ROWS

    @property
    def name(self) -> str:
        return "chain" if self.is_chain else "tile"

    def mm(self, x_TK: Tensor, w_KN: Tensor) -> Tensor:
        """x [T, K] times w [K, N] (row-major). T of at least 1."""
        num_k = w_KN.shape[0]
        if num_k <= CHUNK_K:
            return self._mm_chunk(x_TK, w_KN)
        out_TN = self._mm_chunk(x_TK[:, :CHUNK_K], w_KN[:CHUNK_K])
        for k in range(CHUNK_K, num_k, CHUNK_K):
            out_TN += self._mm_chunk(x_TK[:, k : k + CHUNK_K], w_KN[k : k + CHUNK_K])
        return out_TN

    def _mm_chunk(self, x_TK: Tensor, w_KN: Tensor) -> Tensor:
        num_rows = x_TK.shape[0]
        if self.is_chain:
            return torch.mm(x_TK, w_KN) if num_rows >= MIN_ROWS else torch.mm(_pad_rows(x_TK, MIN_ROWS), w_KN)[:num_rows]
        num_tiles = -(-num_rows // TILE_ROWS)
        tiles = _pad_rows(x_TK, num_tiles * TILE_ROWS).reshape(num_tiles, TILE_ROWS, -1)
        return torch.bmm(tiles, w_KN.expand(num_tiles, *w_KN.shape)).flatten(0, 1)[:num_rows]

    def mm_segments(self, x_RK: Tensor, counts: list[int], weights: list[Tensor], out_RN: Tensor) -> None:
        """Rows [sum(counts[:i]), +counts[i]) of x times weights[i], into the same rows of out.

        x and out carry TILE_ROWS spare rows at the end (finite in x, scratch in out): a segment shorter than the smallest call takes the
        following rows along, whose own segment, coming later, writes over them.
        """
        if x_RK.shape[1] > CHUNK_K:
            part_RN = torch.zeros_like(out_RN)
            for k in range(0, x_RK.shape[1], CHUNK_K):
                self.mm_segments(x_RK[:, k : k + CHUNK_K].contiguous(), counts, [w[k : k + CHUNK_K] for w in weights], part_RN)
                out_RN.copy_(part_RN) if k == 0 else out_RN.add_(part_RN)
            return
        row = 0
        for count, weight in zip(counts, weights, strict=True):
            if count and self.is_chain:
                end = row + (count if count >= MIN_ROWS else MIN_ROWS)
                torch.mm(x_RK[row:end], weight, out=out_RN[row:end])
            elif count:
                for lo in range(row, row + count, TILE_ROWS):
                    torch.mm(x_RK[lo : lo + TILE_ROWS], weight, out=out_RN[lo : lo + TILE_ROWS])
            row += count

    def scores(self, q_BMD: Tensor, k_BLD: Tensor) -> Tensor:
        """q [B, M, D] times k [B, L, D] transposed -> [B, M, L]. D at most CHUNK_K."""
        num_rows = q_BMD.shape[1]
        if self.is_chain:
            if num_rows < self.min_score_rows:
                return torch.bmm(_pad_rows(q_BMD, self.min_score_rows), k_BLD.transpose(1, 2))[:, :num_rows]
            return torch.bmm(q_BMD, k_BLD.transpose(1, 2))
        return self._tiled_bmm(q_BMD, k_BLD.transpose(1, 2), tile_cols=TILE_ROWS)

    def mix(self, p_BML: Tensor, v_BLD: Tensor) -> Tensor:
        """p [B, M, L] times v [B, L, D] -> [B, M, D], in chunks of CHUNK_K of L: zeros at the end of p leave every bit as it is."""
        num_rows, num_keys = p_BML.shape[1], p_BML.shape[2]
        if not self.is_chain:
            return self._tiled_mix(p_BML, v_BLD)
        if num_rows < MIN_ROWS:
            return self.mix(_pad_rows(p_BML, MIN_ROWS), v_BLD)[:, :num_rows]
        out_BMD = torch.bmm(p_BML[:, :, :CHUNK_K], v_BLD[:, :CHUNK_K])
        for lo in range(CHUNK_K, num_keys, CHUNK_K):
            out_BMD += torch.bmm(p_BML[:, :, lo : lo + CHUNK_K], v_BLD[:, lo : lo + CHUNK_K])
        return out_BMD

    def _tiled_bmm(self, a_BMK: Tensor, b_BKN: Tensor, tile_cols: int) -> Tensor:
        """Every call multiplies [TILE_ROWS, K] by [K, tile_cols], whatever M and N are (N a multiple of tile_cols)."""
        num_batch, num_rows, _ = a_BMK.shape
        padded = _pad_rows(a_BMK, -(-num_rows // TILE_ROWS) * TILE_ROWS)
        out_BMN = a_BMK.new_empty(num_batch, padded.shape[1], b_BKN.shape[2])
        for row in range(0, padded.shape[1], TILE_ROWS):
            for col in range(0, b_BKN.shape[2], tile_cols):
                out_BMN[:, row : row + TILE_ROWS, col : col + tile_cols] = torch.bmm(
                    padded[:, row : row + TILE_ROWS].contiguous(), b_BKN[:, :, col : col + tile_cols].contiguous()
                )
        return out_BMN[:, :num_rows]

    def _tiled_mix(self, p_BML: Tensor, v_BLD: Tensor) -> Tensor:
        """Chunks of TILE_ROWS keys, added in ascending order."""
        out_BMD = p_BML.new_zeros(p_BML.shape[0], p_BML.shape[1], v_BLD.shape[2])
        for lo in range(0, p_BML.shape[2], TILE_ROWS):
            out_BMD += self._tiled_bmm(p_BML[:, :, lo : lo + TILE_ROWS], v_BLD[:, lo : lo + TILE_ROWS], tile_cols=v_BLD.shape[2])
        return out_BMD


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    """Zero rows appended on the next to last axis up to num_rows."""
    return torch.nn.functional.pad(x, (0, 0, 0, num_rows - x.shape[-2])) if x.shape[-2] < num_rows else x


@functools.cache
def prove_chain(num_k: int, num_n: int) -> bool:
    """Whether torch.mm of [M, num_k] x [num_k, num_n] is the chain, bit for bit, on this machine.

    Up to CHUNK_K of num_k are used. 2..300 rows are tried against one exact emulation; some milliseconds, cached for the process.
    """
    num_k = min(num_k, CHUNK_K)
    x_TK, w_KN = _random(300, num_k), _random(num_k, num_n)
    whole_TN = torch.mm(x_TK, w_KN)
    cols = slice(0, min(num_n, 64))
    if not torch.equal(row_gemm_reference(x_TK[:32], w_KN[:, cols]), whole_TN[:32, cols]):
        return False
    ways = [torch.mm(x_TK[:m], w_KN) for m in (2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 33, 64, 100, 257)]
    return all(torch.equal(way, whole_TN[: way.shape[0]]) for way in ways)


@functools.cache
def prove_scores(head_dim: int) -> int | None:
    """The smallest of SCORE_ROWS from which q [M, D] x k [L, D] transposed is the chain for every L; None where it is not."""
    q_MD, k_LD = _random(300, head_dim), _random(272, head_dim)
    exact_ML = row_gemm_reference(q_MD[:40], k_LD[:64].t())
    for least in SCORE_ROWS if head_dim <= CHUNK_K else ():
        heights = sorted({*range(least, 41), 64, 100, 128, 256, 257, 300})
        ways = [torch.mm(q_MD[:m], k_LD[:num_keys].t()) for m in heights for num_keys in (16, 48, 160, 272)]
        whole_ML = torch.mm(q_MD, k_LD.t())
        if torch.equal(whole_ML[:40, :64], exact_ML) and all(torch.equal(way, whole_ML[: way.shape[0], : way.shape[1]]) for way in ways):
            return least
    return None


def _random(rows: int, cols: int) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 8191 + cols))


def row_gemm_for(weights: tuple[tuple[int, int], ...], head_dim: int) -> RowGemm:
    """The way that is exact on this machine for weights of these (K, N) and heads of this size: chain where proven for all, else tile."""
    score_rows = prove_scores(head_dim)
    is_chain = score_rows is not None and prove_chain(CHUNK_K, head_dim) and all(prove_chain(num_k, num_n) for num_k, num_n in weights)
    return RowGemm(is_chain=is_chain, min_score_rows=score_rows if is_chain and score_rows is not None else TILE_ROWS)
