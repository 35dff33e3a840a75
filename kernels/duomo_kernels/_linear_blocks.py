"""Owns what the kernels of dense products load and store: blocks of rows and of weights, sums or their transpose. Knows no product.

Legend: M rows of a block, N weight rows (outputs), K columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weight_block(w, w_desc, column, k0, num_n, num_k, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """[BN, BK]. Past the last row another row or zeros: those outputs are not stored."""
    if w_desc is not None:
        return w_desc.load([column, k0])
    else:
        at_N = tl.minimum(column + tl.arange(0, BN), num_n - 1).to(tl.int64)
        k_K = k0 + tl.arange(0, BK)
        at_NK = w + at_N[:, None] * num_k + k_K[None, :]
        return tl.load(at_NK) if EVEN_K else tl.load(at_NK, mask=k_K[None, :] < num_k, other=0.0)


@triton.jit
def row_block(x_M, is_row_M, k0, num_k, BK: tl.constexpr, EVEN_K: tl.constexpr):
    """[M, BK]; zeros past the last row, and past the last column unless EVEN_K."""
    k_K = k0 + tl.arange(0, BK)
    is_here_MK = is_row_M[:, None] if EVEN_K else is_row_M[:, None] & (k_K < num_k)[None, :]
    return tl.load(x_M[:, None] + k_K[None, :], mask=is_here_MK, other=0.0)


@triton.jit
def store_sums(out, sum_, row_M, num_rows, col_N, num_n, IS_SWAPPED: tl.constexpr):
    """[M, N], or [N, M] where swapped, into out [rows, num_n]."""
    if IS_SWAPPED:
        at_ = out + row_M.to(tl.int64)[None, :] * num_n + col_N[:, None]
        tl.store(at_, sum_.to(out.dtype.element_ty), mask=(row_M < num_rows)[None, :] & (col_N < num_n)[:, None])
    else:
        at_ = out + row_M.to(tl.int64)[:, None] * num_n + col_N[None, :]
        tl.store(at_, sum_.to(out.dtype.element_ty), mask=(row_M < num_rows)[:, None] & (col_N < num_n)[None, :])
