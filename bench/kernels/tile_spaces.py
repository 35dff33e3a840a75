"""Owns which launch configurations a search tries for each operation and size. Knows neither time nor tensors.

Kept small: what is known to lose is not listed. A product that reads weights for few rows wants many bytes on their way (deep K, several
stages, narrow tiles, several programs a multiprocessor); one of many rows wants 128 x 256 of sums in registers and its stages in 227 KiB.

Legend: T tokens, K experts a token, E experts.
"""

from __future__ import annotations

from dataclasses import replace

from duomo_kernels._decode_pieces import DecodeConfig, Merge
from duomo_kernels.expert_direct import DirectTiles
from duomo_kernels.expert_gemm import GemmTile
from duomo_kernels.expert_gemm_fp8 import Fp8Tile

BANDS = (8, 16)  # tiles whose columns run together, beside an expert's own
SHARED_BYTES = 227 << 10  # of a multiprocessor, what a program may have


def heights(num_tokens: int, top_k: int, num_experts: int) -> tuple[int, ...]:
    """Rows of a tile worth trying: near the mean rows of an expert, since one that is not full computes padding."""
    mean = num_tokens * top_k / num_experts
    return (16,) if mean <= 8 else (16, 32) if mean <= 24 else (32, 64) if mean <= 48 else (64, 128) if mean <= 256 else (128,)


def up_tiles(block_m: int) -> list[GemmTile]:
    """Tiles of the first product; block_n counts columns of gate, and as many of up are loaded."""
    if block_m >= 128:
        sizes = [(128, 64, 8, 4), (128, 64, 8, 3), (64, 128, 8, 3)]
    elif block_m == 64:
        sizes = [(64, 128, 4, 2), (64, 128, 4, 3), (32, 128, 4, 3), (64, 64, 4, 4), (128, 64, 8, 4)]
    else:
        sizes = [(32, 256, 4, 3), (32, 128, 4, 4), (32, 128, 4, 5), (32, 512, 4, 2), (64, 128, 4, 3)]
    found = [tile for n, k, warps, stages in sizes for tile in _launches(block_m, n, k, warps, stages) if _fits(block_m, 2 * n, k, stages)]
    return found + [replace(found[0], band=band) for band in BANDS if block_m >= 128]


def down_tiles(block_m: int) -> list[GemmTile]:
    """Tiles of the second product."""
    if block_m >= 128:
        sizes = [(256, 64, 8, 4), (128, 128, 8, 3), (128, 64, 8, 3)]
    elif block_m == 64:
        sizes = [(128, 128, 4, 2), (128, 128, 4, 3), (64, 128, 4, 3), (256, 64, 8, 4)]
    else:
        sizes = [(64, 256, 4, 3), (32, 256, 4, 4), (64, 128, 4, 4), (128, 64, 4, 5)]
    found = [tile for n, k, warps, stages in sizes for tile in _launches(block_m, n, k, warps, stages) if _fits(block_m, n, k, stages)]
    return found + [
        replace(tile, is_flat=True) for tile in found if not tile.touch and block_m >= 128 and tile.block_n * tile.block_k > 8192
    ]


def _fits(block_m: int, columns: int, block_k: int, num_stages: int) -> bool:
    return (block_m + columns) * block_k * 2 * num_stages <= SHARED_BYTES


def _launches(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> list[GemmTile]:
    """With and without a touch where weights are what is waited for. Persistent launches without the flat loop won nowhere."""
    tile = GemmTile(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=num_warps, num_stages=num_stages)
    return [tile] if block_m >= 128 else [tile, replace(tile, touch=256)]


def direct_tiles(num_tokens: int) -> list[DirectTiles]:
    """A few tokens without a sort: rows in flight against programs."""
    found = [
        DirectTiles(gate_up_rows=rows, gate_up_steps=steps, gate_up_warps=warps, down_rows=down_rows, down_width=width, down_depth=depth)
        for rows, steps, warps in ((1, 8, 4), (2, 8, 4), (2, 16, 4), (4, 4, 8))
        for down_rows, width, depth in ((4, 512, 4), (8, 512, 4), (4, 1024, 2), (4, 256, 8))
    ]
    return (
        found if num_tokens > 1 else found + [DirectTiles(gate_up_rows=1, gate_up_steps=16), DirectTiles(gate_up_rows=2, gate_up_steps=12)]
    )


def up_tiles_fp8(block_m: int) -> list[Fp8Tile]:
    """block_n is 128: the epilogue quantises in groups of that. By TMA only where the compiler then spills nothing."""
    if block_m >= 128:
        sizes = [(8, 4, False, 1), (8, 3, False, 1), (8, 3, False, 0)]
    elif block_m == 64:
        sizes = [(4, 2, False, 0), (8, 3, True, 0)]
    else:
        sizes = [(4, 2, True, 0), (4, 3, True, 0), (4, 4, True, 0)] + ([(8, 3, True, 0)] if block_m == 32 else [])
    return [
        Fp8Tile(block_m=block_m, block_n=128, num_warps=warps, num_stages=stages, use_tma=tma, num_programs=programs, touch=touch)
        for warps, stages, tma, programs in sizes
        for touch in ((0,) if block_m >= 128 else (0, 256))
    ]


def down_tiles_fp8(block_m: int) -> list[Fp8Tile]:
    """By TMA; two blocks of 128 columns where few programs are wanted."""
    warps = 8 if block_m >= 128 else 4
    sizes = [(256, 4), (128, 4), (128, 5)] if block_m >= 64 else [(64, 5), (128, 4), (128, 5), (256, 3)]
    return [
        Fp8Tile(block_m=block_m, block_n=n, num_warps=warps, num_stages=stages, touch=touch)
        for n, stages in sizes
        for touch in ((0,) if block_m >= 128 else (0, 256))
    ]


def decode_configs(usual: DecodeConfig) -> list[DecodeConfig]:
    """Around the heuristic's: keys a tile, depth, programs a multiprocessor, who adds the pieces, whether short runs come late."""
    return [
        replace(usual, block_keys=keys, num_stages=stages, num_warps=warps, programs_per_sm=programs, merge=merge, late=late)
        for keys, warps in ((usual.block_keys, 4), (2 * usual.block_keys, 8))
        for stages in (7, usual.num_stages)
        for programs in (1, 2)
        for merge, late in _MERGES
    ]


_MERGES: tuple[tuple[Merge, int], ...] = (("ticket", 0), ("kernel", 0), ("ticket", 16))
