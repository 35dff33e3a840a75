"""Owns the order in which programs meet the tiles of a routed product, their number, and who may touch early. Knows no maths.

Legend: M tiles of the map (Routing.tiles_M5), each times a number of columns: what one program computes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from duomo_kernels._launch import num_sms
from duomo_kernels._routing import Routing

TMA_BYTES = 16  # a descriptor's rows start at multiples of this
BY_EXPERT = tl.constexpr(0)
TOUCHING_PER_SM = 2  # programs that may be there before the kernel before has ended; later ones would only read twice


@triton.jit
def find_tile(pid, tiles, num_tiles, num_columns, BAND: tl.constexpr, CACHE: tl.constexpr):
    """pid -> (expert, first place, rows, column of tiles); pids below num_tiles * num_columns meet every pair once.

    A band is BAND successive tiles, columns outer, tiles inner; the groups of the map (BY_EXPERT) are bands that end where an expert does,
    at the price of one more load before the first that matters. num_tiles is read where BAND is above 1.
    """
    if BAND == BY_EXPERT:
        at = tiles + (pid // num_columns) * 5
        first_tile, band_tiles = tl.load(at + 3, cache_modifier=CACHE), tl.load(at + 4, cache_modifier=CACHE)
    elif BAND == 1:
        first_tile, band_tiles = pid // num_columns, 1
    else:
        first_tile = pid // (num_columns * BAND) * BAND
        band_tiles = tl.minimum(num_tiles - first_tile, BAND)
    local = pid - first_tile * num_columns
    at = tiles + (first_tile + local % band_tiles) * 5
    expert, first, rows = (
        tl.load(at, cache_modifier=CACHE),
        tl.load(at + 1, cache_modifier=CACHE),
        tl.load(at + 2, cache_modifier=CACHE),
    )
    return expert, first, rows, local // band_tiles


def num_programs(routing: Routing, num_columns: int, per_sm: int, device: torch.device) -> int:
    """One program for each tile that any routing of this size may need, or per_sm (not 0) for each multiprocessor."""
    most = routing.tiles_M5.shape[0] * num_columns
    return min(most, per_sm * num_sms(device)) if per_sm else most


def num_touching(device: torch.device) -> int:
    """How many programs, the first ones, may touch weights before their turn."""
    return TOUCHING_PER_SM * num_sms(device)
