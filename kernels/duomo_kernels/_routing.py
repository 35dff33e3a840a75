"""Owns the tensors in which a gate tells the experts' kernels who goes where. Knows no kernel.

Everything has a fixed size for a given number of rows T, so that a captured graph can be replayed with other routings. R = T * K places.

    sorted place p holds routed index routed_R[p] = token * K + rank; places of one expert are successive, in order of routed index
    place_R[routed index] = p, or R where the assignment was dropped or its row is padding
    expert e owns places offsets_E1[e] .. offsets_E1[e + 1]; places from offsets_E1[E] on are empty and routed_R holds R there
    tiles_M5[i] = (expert, first place, rows, group's first tile, group's tiles) for i < num_tiles; later rows are not written. A tile
    holds 1 to tile_rows rows of one expert; all but an expert's last are full. A group is up to GROUP_TILES successive tiles of an expert
    counts_E: what the gate chose for valid rows, before any capacity limit: the histogram that routing metrics read

Legend: T tokens, K experts a token, R routed places, E experts, M tiles at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GROUP_TILES = 16  # tiles of one expert that share its weights through L2 before the next 16: 2,048 rows of 128-row tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRule:
    """How a model chooses experts from logits. Ties go to the lowest expert.

    score = softmax(logits) or sigmoid(logits); choice by score + bias (a tensor passed beside the rule), weight from the score alone.
    Groups (DeepSeek-V3): experts in num_groups equal runs, a group worth the sum of its two best choices, only the top_groups best stay.
    normalise divides the chosen weights by their sum (Mixtral's softmax over the selected is the same); routed_scale multiplies them last.

        Switch: softmax, top_k 1       OLMoE: softmax       Mixtral, Qwen3: softmax, normalise
        DeepSeek-V3: sigmoid, normalise, num_groups 8, top_groups 4, routed_scale 2.5, bias
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    num_groups: int = 1
    top_groups: int = 1
    routed_scale: float = 1.0

    def __post_init__(self) -> None:
        assert self.top_k >= 1 and 1 <= self.top_groups <= self.num_groups, self


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """weights_TK float32, ids_TK int32 (0 <= id < E also for padded rows), the rest int32. num_tiles [1]."""

    weights_TK: Tensor
    ids_TK: Tensor
    counts_E: Tensor
    offsets_E1: Tensor
    routed_R: Tensor
    place_R: Tensor
    tiles_M5: Tensor
    num_tiles: Tensor
    tile_rows: int

    @property
    def top_k(self) -> int:
        return self.ids_TK.shape[1]

    @property
    def num_experts(self) -> int:
        return self.counts_E.shape[0]


def max_tiles(num_routed: int, num_experts: int, tile_rows: int) -> int:
    """The most tiles that any routing of num_routed places needs: each expert that has rows has at most one tile that is not full."""
    return num_routed // tile_rows + min(num_routed, num_experts)


def routing_reference(ids_TK: Tensor, weights_TK: Tensor, num_experts: int, tile_rows: int, num_valid: int | None = None) -> Routing:
    """Order and tiles of given choices, dropless, in plain Python: the definition of the fields above."""
    num_tokens, top_k = ids_TK.shape
    num_valid = num_tokens if num_valid is None else num_valid
    num_routed = num_tokens * top_k
    flat = ids_TK[:num_valid].flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    counts = [flat.count(e) for e in range(num_experts)]
    places = [num_routed] * num_routed
    for place, index in enumerate(order):
        places[index] = place
    offsets: list[int] = [0]
    tiles: list[list[int]] = []
    for expert, count in enumerate(counts):
        first = len(tiles)
        for row in range(0, count, tile_rows):
            tiles.append([expert, offsets[-1] + row, min(tile_rows, count - row)])
        num = len(tiles) - first
        for i in range(num):
            start = i // GROUP_TILES * GROUP_TILES
            tiles[first + i] += [first + start, min(GROUP_TILES, num - start)]
        offsets.append(offsets[-1] + count)
    padded = tiles + [[0] * 5] * (max_tiles(num_routed, num_experts, tile_rows) - len(tiles))

    def int32(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=ids_TK.device)

    return Routing(
        weights_TK=weights_TK.float(),
        ids_TK=ids_TK.int(),
        counts_E=int32(counts),
        offsets_E1=int32(offsets),
        routed_R=int32(order + [num_routed] * (num_routed - len(order))),
        place_R=int32(places),
        tiles_M5=int32(padded).reshape(-1, 5),
        num_tiles=int32([len(tiles)]),
        tile_rows=tile_rows,
    )
