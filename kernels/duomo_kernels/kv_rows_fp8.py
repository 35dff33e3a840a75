"""Owns the format in which keys and values cross in fp8, and its arithmetic in torch. Knows no pool, ring, handle or GPU.

    row x of D numbers (one head's k or v of one token):     m = max |x|
        s = the smallest integer >= 10 with m <= 448 * 2^(s - 127)          code[c] = e4m3(x[c] / 2^(s - 127)), to nearest even
        x'[c] = code[c] * 2^(s - 127)

    packed     [codes: R rows of D bytes][s: R bytes]

448 is e4m3's largest number. s is a scale in E8M0, a power of two (OCP Microscaling Formats 1.0), here one a row: e4m3 reaches 2^-14 of
the row's largest number with all its bits, so finer scales would gain nothing but bytes. Against a float32 scale of m / 448 a power of two
costs at most one of those 14 binades, saves three bytes a row, and makes everything but the rounding to e4m3 exact: any device packs the
same bytes, codes land in float32 and bfloat16 as they are (in float16 too, but for its subnormals), and what has landed packs to the same
numbers again.

    |x' - x| <= max(2^-4 |x|, 2^-10 * 2^(s - 127)),  and 2^(s - 127) < m / 224  unless s = 10

so a row of zeros stays one, and rows below 2^-108 lose their last bits and then themselves. A row that holds an infinity or a NaN has
s = 255 (E8M0's NaN) and zeros, and lands as a row of NaN: what was poisoned stays poisoned. A number within 2^-4 of the largest of its
dtype may land as infinity.

Legend: R rows, D head dim.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

E4M3_MAX = 448.0
MIN_EXPONENT = 10  # 2^-117: a code's smallest step, 2^-9 of it, is still a normal number
NAN_EXPONENT = 255
_INFINITY_BITS = 0x7F80_0000


def packed_bytes(num_rows: int, head_dim: int) -> int:
    """Bytes of so many rows, codes and exponents."""
    return num_rows * (head_dim + 1)


def split_packed(packed_P: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """(codes uint8 [R, D], exponents uint8 [R]): views of packed rows, uint8 and contiguous."""
    num_rows = packed_P.numel() // (head_dim + 1)
    assert packed_P.dtype == torch.uint8 and packed_P.numel() == packed_bytes(num_rows, head_dim), (
        packed_P.dtype,
        packed_P.shape,
        head_dim,
    )
    return packed_P[: num_rows * head_dim].view(num_rows, head_dim), packed_P[num_rows * head_dim :]


def kv_rows_fp8_reference(x_RD: Tensor) -> Tensor:
    """Packed rows, uint8: row by row in float64, every number against every code."""
    num_rows, head_dim = x_RD.shape
    number_C = _numbers()[:127].double()
    packed_P = torch.zeros(packed_bytes(num_rows, head_dim), dtype=torch.uint8)
    codes_RD, exponent_R = split_packed(packed_P, head_dim)
    for row in range(num_rows):
        x_D = x_RD[row].double().cpu()
        if not bool(x_D.isfinite().all()):
            exponent_R[row] = NAN_EXPONENT
            continue
        exponent = MIN_EXPONENT
        while float(x_D.abs().max()) > E4M3_MAX * 2.0 ** (exponent - 127):
            exponent += 1
        away_DC = (x_D[:, None].abs() / 2.0 ** (exponent - 127) - number_C).abs()
        code_D = away_DC.argmin(dim=1)
        above_D = (code_D + 1).clamp_max(126)
        is_tie_D = away_DC.gather(1, above_D[:, None])[:, 0] == away_DC.amin(dim=1)
        code_D = torch.where(is_tie_D & (code_D % 2 == 1), above_D, code_D)
        codes_RD[row], exponent_R[row] = (code_D + 128 * x_D.signbit()).to(torch.uint8), exponent
    return packed_P


def kv_rows_fp8(x_RD: Tensor, packed_P: Tensor) -> None:
    """Pack rows x (float32, bfloat16 or float16, contiguous) into packed (uint8, packed_bytes())."""
    codes_RD, exponent_to_R = split_packed(packed_P, x_RD.shape[1])
    assert codes_RD.shape == x_RD.shape, (codes_RD.shape, x_RD.shape)
    wide_RD = x_RD.float()
    top_R = (wide_RD.view(torch.int32) & 0x7FFF_FFFF).amax(dim=1).clamp_max(_INFINITY_BITS)  # as integers a NaN is above infinity
    # 0x1F_FFFF carries into the exponent where the significand is above 1.75
    exponent_R = (((top_R + 0x1F_FFFF) >> 23) - 8).clamp_min(MIN_EXPONENT)
    scaled_RD = wide_RD * ((254 - exponent_R) << 23).view(torch.float32)[:, None]
    is_poisoned_R = top_R == _INFINITY_BITS
    if bool(is_poisoned_R.any()):
        exponent_R[is_poisoned_R] = NAN_EXPONENT
        scaled_RD[is_poisoned_R] = 0.0
    codes_RD.view(torch.float8_e4m3fn).copy_(scaled_RD)
    exponent_to_R.copy_(exponent_R)


def kv_rows_of_fp8(packed_P: Tensor, x_RD: Tensor) -> None:
    """Write the numbers that packed rows (uint8) stand for into x (float32)."""
    codes_RD, exponent_R = split_packed(packed_P, x_RD.shape[1])
    assert codes_RD.shape == x_RD.shape and x_RD.dtype == torch.float32, (codes_RD.shape, x_RD.shape, x_RD.dtype)
    # a table, because torch 2.13 widens e4m3 on a CPU four times slower
    torch.index_select(_numbers(), 0, codes_RD.int().view(-1), out=x_RD.view(-1))
    x_RD.mul_((exponent_R.int() << 23).view(torch.float32)[:, None])  # of 255: infinity, and 0 times that is NaN


@functools.cache
def _numbers() -> Tensor:
    """What each of the 256 codes stands for, float32."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
