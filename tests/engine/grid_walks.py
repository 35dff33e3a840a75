"""Walks of a wave's grid of layers and chunks: drawn ones that keep the order, and the three that have names."""

from __future__ import annotations

import random
from collections.abc import Iterator

Cell = tuple[tuple[int, int], tuple[int, int]]
"""(layers lo..hi, chunks first..end) of one piece."""


def layered(num_layers: int, num_chunks: int, layers_each: int = 1) -> Iterator[Cell]:
    """All chunks through some layers, then through the next."""
    for lo in range(0, num_layers, layers_each):
        yield (lo, min(lo + layers_each, num_layers)), (0, num_chunks)


def chunked(num_layers: int, num_chunks: int) -> Iterator[Cell]:
    """One chunk through all layers, then the next."""
    for chunk in range(num_chunks):
        yield (0, num_layers), (chunk, chunk + 1)


def drawn(num_layers: int, num_chunks: int, made: random.Random) -> Iterator[Cell]:
    """Pieces of any layers of any chunk that may run."""
    next_layers = [0] * num_chunks
    while next_layers[-1] < num_layers:
        limits = [num_layers, *next_layers]
        chunk = made.choice([each for each in range(num_chunks) if next_layers[each] < limits[each]])
        lo = next_layers[chunk]
        next_layers[chunk] = made.randint(lo + 1, limits[chunk])
        yield (lo, next_layers[chunk]), (chunk, chunk + 1)
