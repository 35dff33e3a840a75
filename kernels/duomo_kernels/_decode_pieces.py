"""Owns how decode attention is cut into pieces, the room that pieces take, and how they are added. Knows no keys.

The work is a row of tiles: items (sequence, kv head) one after another. Each of P programs takes a run of W / P of the W tiles, the
first ones one more. In an item, pieces are numbered along its tiles, by program or by chunk; slots of the workspace follow the items.

Legend: S sequences, N kv heads, G query heads of one, D head dim, R query heads of a merge, U pieces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, num_sms, start_next, wait_for_previous
from duomo_kernels._tuning import Config, tuned

MERGE_ROWS = 128  # rows (piece, query head) of D float32 that a merge loads at one time: 64 KiB of 128, 128 registers a thread
TICKET_ROUNDS = 2  # such loads an item, on average, up to which its last program adds it; beyond, a kernel of one program a query head
TUNING_OP = "decode_attention"
MOST_PROGRAMS_PER_SM = 4  # that a configuration may ask for: a workspace has room for as many, whatever the table says of other batches


Merge = Literal["ticket", "kernel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """Keys a tile, pipeline depth and warps of a program, programs a multiprocessor, and who adds the pieces."""

    block_keys: int
    num_stages: int
    num_warps: int
    programs_per_sm: int
    merge: Merge

    def __post_init__(self) -> None:
        assert self.block_keys >= 16 and self.block_keys & (self.block_keys - 1) == 0, f"{self}: keys are a power of two from 16 on"
        assert self.num_warps in (1, 2, 4, 8) and self.num_stages >= 1, self
        assert 1 <= self.programs_per_sm <= MOST_PROGRAMS_PER_SM and self.merge in get_args(Merge), self


def config_from(config: Config) -> DecodeConfig:
    """A configuration from a tuning table's entry: the fields by name."""
    fields: dict[str, Any] = dict(config)
    return DecodeConfig(**fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeWorkspace:
    """Pieces of one call: allocated once by the caller, reused by every later call on the same stream. Tickets are zero between calls."""

    acc_UGD: Tensor
    max_UG: Tensor
    sum_UG: Tensor
    tickets: Tensor


@triton.jit
def item_ends(lengths_ptr, num_sequences, N: tl.constexpr, BLOCK: tl.constexpr, S_PAD: tl.constexpr):
    """The tile at which each sequence's last item ends, and in one number the sequence and the place of its last key in a tile."""
    lane_S = tl.arange(0, S_PAD)
    length_S = tl.load(lengths_ptr + lane_S, mask=lane_S < num_sequences, other=0)
    ends_S = tl.cumsum((length_S + BLOCK - 1) // BLOCK, 0) * N
    return ends_S, lane_S * BLOCK + (length_S + BLOCK - 1) % BLOCK


@triton.jit
def locate(tile, ends_S, keys_S, N: tl.constexpr, BLOCK: tl.constexpr):
    """Of the item that holds this tile: sequence, kv head, first tile, number of tiles and length."""
    is_past_S = ends_S <= tile
    start = tl.max(tl.where(is_past_S, ends_S, 0), 0)
    end = tl.min(tl.where(is_past_S, 0x7FFFFFFF, ends_S), 0)
    key = tl.min(tl.where(is_past_S, 0x7FFFFFFF, keys_S), 0)
    tiles = tl.maximum((end - start) // N, 1)
    head = (tile - start) // tiles
    return key // BLOCK, head, start + head * tiles, tiles, (tiles - 1) * BLOCK + key % BLOCK + 1


@triton.jit
def run_start(pid, total, num_programs):
    """First tile of a program's run: total / P tiles each, one more for the first programs. No product can leave 32 bits."""
    per = total // tl.maximum(num_programs, 1)
    return pid * per + tl.minimum(pid, total - per * num_programs)


@triton.jit
def owner(tile, total, num_programs):
    """The program whose run holds this tile."""
    per = total // num_programs
    rest = total - per * num_programs
    longer = rest * (per + 1)
    return tl.where(tile < longer, tile // (per + 1), rest + (tile - longer) // per)


@triton.jit
def chunk_start(tile, total, ends_S, keys_S, N: tl.constexpr, BLOCK: tl.constexpr, CHUNK_TILES: tl.constexpr):
    """The first tile from this one on at which a chunk of an item begins."""
    _, _, begin, tiles, _ = locate(tl.minimum(tile, total - 1), ends_S, keys_S, N, BLOCK)
    return begin + tl.minimum((tile - begin + CHUNK_TILES - 1) // CHUNK_TILES * CHUNK_TILES, tiles)


@triton.jit
def pieces(item, begin, tiles, total, num_programs, CHUNK_TILES: tl.constexpr):
    """First slot and number of an item's pieces. Each later piece or item takes the next slots, so that no two share one."""
    if CHUNK_TILES > 0:
        first = begin // CHUNK_TILES
        count = (tiles + CHUNK_TILES - 1) // CHUNK_TILES
    else:
        first = owner(begin, total, num_programs)
        count = owner(begin + tiles - 1, total, num_programs) - first + 1
    return item + first, count


@triton.jit
def merge(acc_ptr, max_ptr, sum_ptr, slot, count, row_R, G: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """Query heads row_R of an item [R, D]: its pieces in their order, PIECES at a time. L1 may hold an earlier call's: loads pass by it."""
    lane_U = tl.arange(0, PIECES)
    lane_D = tl.arange(0, D)
    top_R = tl.full(row_R.shape, float("-inf"), tl.float32)
    sum_R = tl.zeros(row_R.shape, tl.float32)
    acc_RD = tl.zeros((row_R.shape[0], D), tl.float32)
    for at in tl.range(0, count, PIECES, num_stages=1):  # not prefetched: copies of 4 bytes would go through L1
        live_UR = (at + lane_U < count)[:, None] & (row_R < G)[None, :]
        at_UR = (slot + at + lane_U).to(tl.int64)[:, None] * G + row_R[None, :]
        max_UR = tl.load(max_ptr + at_UR, mask=live_UR, other=-1e30, cache_modifier=".cg")
        part_UR = tl.load(sum_ptr + at_UR, mask=live_UR, other=0.0, cache_modifier=".cg")
        part_URD = tl.load(
            acc_ptr + at_UR[:, :, None] * D + lane_D[None, None, :], mask=live_UR[:, :, None], other=0.0, cache_modifier=".cg"
        )
        new_top_R = tl.maximum(top_R, tl.max(max_UR, 0))
        shrink_R = tl.exp2(top_R - new_top_R)
        share_UR = tl.exp2(max_UR - new_top_R[None, :])
        sum_R = sum_R * shrink_R + tl.sum(share_UR * part_UR, 0)
        acc_RD = acc_RD * shrink_R[:, None] + tl.sum(share_UR[:, :, None] * part_URD, 0)
        top_R = new_top_R
    return acc_RD / sum_R[:, None]


@triton.jit
def merge_kernel(
    lengths_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    num_sequences,
    num_programs,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK_TILES: tl.constexpr,
    PIECES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (item, query head): adds the pieces of an item that has several."""
    pid = tl.program_id(0)
    item = pid // G
    seq = item // N
    wait_for_previous(USE_PDL)
    ends_S, _ = item_ends(lengths_ptr, num_sequences, N, BLOCK, S_PAD)
    start_next(USE_PDL)
    total = tl.max(ends_S, 0)
    start = tl.max(tl.where(tl.arange(0, S_PAD) < seq, ends_S, 0), 0)
    tiles = (tl.max(tl.where(tl.arange(0, S_PAD) == seq, ends_S, 0), 0) - start) // N
    begin = start + item % N * tiles
    if tiles > 0:
        slot, count = pieces(item, begin, tiles, total, tl.minimum(num_programs, total), CHUNK_TILES)
        if count > 1:
            row_R = pid % G + tl.arange(0, 1)
            out_RD = merge(acc_ptr, max_ptr, sum_ptr, slot, count, row_R, G, D, PIECES)
            at_RD = pid.to(tl.int64) * D + tl.arange(0, D)[None, :]
            tl.store(out_ptr + at_RD, out_RD.to(out_ptr.dtype.element_ty))


def _default_config(num_items: int, group: int, head_dim: int, device: torch.device) -> DecodeConfig:
    """64 keys of 128 are 32 KiB of keys and values: two tiles in flight in each of two programs a multiprocessor. A third with its queries,
    beside the room in which a piece changes its layout, would leave space for one program.

    Where programs outnumber items by far, an item has many pieces and one program would add them alone: a second kernel is wider.
    """
    if device.type != "cuda":
        return DecodeConfig(block_keys=16, num_stages=1, num_warps=4, programs_per_sm=2, merge="ticket")
    rows = 2 * num_sms(device) * group
    merge: Merge = "ticket" if rows <= TICKET_ROUNDS * MERGE_ROWS * num_items else "kernel"
    return DecodeConfig(block_keys=64 if head_dim > 64 else 128, num_stages=5, num_warps=4, programs_per_sm=2, merge=merge)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeShape:
    """What fixes a launch: nothing in it comes from the device."""

    num_sequences: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    max_blocks: int
    chunk_tokens: int | None = None

    def config(self, device: torch.device) -> DecodeConfig:
        """What was measured on this device for the nearest number of sequences, else the heuristic's.

        Chunked calls ask no table: what the caller cuts at must fit the tile on every device, and a sequence's bits, which promise not to
        depend on its company, would follow the entry of the batch that it is in.
        """
        sizes = {"num_q_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        found = tuned(TUNING_OP, sizes, "bf16", self.num_sequences, device) if self.chunk_tokens is None else None
        return self.heuristic(device) if found is None else config_from(found)

    def heuristic(self, device: torch.device) -> DecodeConfig:
        return _default_config(self.num_sequences * self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_dim, device)

    def num_pieces(self, config: DecodeConfig, device: torch.device) -> int:
        """The most slots that pieces of any lengths take (see pieces)."""
        items = self.num_sequences * self.num_kv_heads
        if self.chunk_tokens is None:
            return items + config.programs_per_sm * num_sms(device)
        return items + -(-items * -(-self.max_blocks * self.block_tokens // config.block_keys) // (self.chunk_tokens // config.block_keys))


def decode_workspace(shape: DecodeShape, device: torch.device, config: DecodeConfig | None = None) -> DecodeWorkspace:
    """Room for the pieces of any call of this shape, or of fewer sequences, with this configuration; without one, with any table's."""
    group = shape.num_heads // shape.num_kv_heads
    config = config or replace(shape.config(device), programs_per_sm=MOST_PROGRAMS_PER_SM)
    pieces = shape.num_pieces(config, device)
    return DecodeWorkspace(
        acc_UGD=torch.empty(pieces, group, shape.head_dim, dtype=torch.float32, device=device),
        max_UG=torch.empty(pieces, group, dtype=torch.float32, device=device),
        sum_UG=torch.empty(pieces, group, dtype=torch.float32, device=device),
        tickets=torch.zeros(shape.num_sequences * shape.num_kv_heads, dtype=torch.int32, device=device),
    )


def check_workspace(workspace: DecodeWorkspace, shape: DecodeShape, config: DecodeConfig, device: torch.device) -> None:
    group, pieces = shape.num_heads // shape.num_kv_heads, shape.num_pieces(config, device)
    check("workspace.acc", workspace.acc_UGD, torch.float32, None, group, shape.head_dim, device=device)
    check("workspace.max", workspace.max_UG, torch.float32, None, group, device=device)
    check("workspace.sum", workspace.sum_UG, torch.float32, None, group, device=device)
    held = min(workspace.acc_UGD.shape[0], workspace.max_UG.shape[0], workspace.sum_UG.shape[0])
    assert held >= pieces, f"workspace holds {held} pieces, this shape may need {pieces}"
    assert workspace.tickets.numel() >= shape.num_sequences * shape.num_kv_heads, "workspace has too few tickets"
    chunk = shape.chunk_tokens
    assert chunk is None or (chunk > 0 and chunk % config.block_keys == 0), f"chunk_tokens {chunk}: a multiple of {config.block_keys}"
