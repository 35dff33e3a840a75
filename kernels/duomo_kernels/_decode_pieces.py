"""Owns how decode attention may be configured, the room that its plan and its pieces take, and how pieces are added. Knows no keys.

The work of one kv head is a row of tiles: sequences one after another, each ceil(length / BLOCK) tiles, one where nothing is cached. It is
cut into runs, alike for every head, so that a plan made once a step (decode_plan.py) serves all heads and all layers. What a run reads of a
sequence is a piece. Slots of the workspace follow the sequences and, in one, its pieces.

Legend: S sequences, N kv heads, G query heads of one, D head dim, R query heads of a merge, U slots (pieces of one head), T tiles, C runs,
B blocks of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from duomo_kernels._launch import check, num_sms, pdl_options, start_next, wait_for_previous
from duomo_kernels._tuning import Config, tuned

MERGE_ROWS = 64  # rows (piece, query head) of D float32 that a merge loads at one time: 32 KiB of 128, 64 registers a thread
LIGHT_GROUP = 2  # query heads of a kv head whose pieces a program adds by the way
TUNING_OP = "decode_attention"
MOST_PROGRAMS_PER_SM = 4  # that a configuration may ask for: a workspace has room for as many, whatever the table says of other batches
MERGES_PER_SM = 2  # programs of the second kernel that find room beside those of the first
MOST_LATE_RUNS = 4
KEYS_A_WARP = 16  # at least: what one mma takes of weights times values
EVEN_SHARE = 16  # one multiprocessor in so many may be left without a run
RUN_WORDS = 8  # of a run's record, see DecodePlan
Merge = Literal["ticket", "kernel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeConfig:
    """Keys a tile, pipeline depth and warps of a program, programs a multiprocessor, and who adds the pieces.

    late: one in so many tiles is left to further runs, short ones, late_runs for each of the others, which start as multiprocessors become
    free: equal runs do not end together, since memory does not serve all multiprocessors alike. 0 for none.
    touch: tiles of a run, a power of two or none, brought into L2 while the kernel before still runs; only where the plan is settled.
    """

    block_keys: int
    num_stages: int
    num_warps: int
    programs_per_sm: int
    merge: Merge
    late: int = 0
    late_runs: int = 1
    touch: int = 0

    def __post_init__(self) -> None:
        assert self.block_keys & (self.block_keys - 1) == 0 and self.block_keys <= 512, f"{self}: keys are a power of two up to 512"
        assert self.num_warps in (1, 2, 4, 8) and self.num_stages >= 1, self
        assert self.block_keys >= KEYS_A_WARP * self.num_warps, f"{self}: {KEYS_A_WARP} keys a warp at least"
        assert (
            1 <= self.programs_per_sm <= MOST_PROGRAMS_PER_SM
            and self.merge in get_args(Merge)
            and (self.late == 0 or self.late >= 2)  # with all tiles late, nothing would be left for the first runs
            and 1 <= self.late_runs <= MOST_LATE_RUNS
        ), self


def config_from(config: Config) -> DecodeConfig:
    """A configuration from a tuning table's entry: the fields by name."""
    fields: dict[str, Any] = dict(config)
    return DecodeConfig(**fields)


def _default_config(num_items: int, group: int, head_dim: int, device: torch.device) -> DecodeConfig:
    """Few items: one program a multiprocessor, which leaves the fewest pieces, five tiles of 32 KiB in flight. Many: two, one of which
    reads while the other ends a sequence, three tiles in flight in each, and late runs where a piece costs little.

    A piece of many query heads takes long to add; where items have several, a second kernel, which is wider, adds them sooner.
    """
    if device.type != "cuda":
        return DecodeConfig(block_keys=16, num_stages=1, num_warps=1, programs_per_sm=2, merge="ticket")
    keys, is_many, is_light = 64 if head_dim > 64 else 128, num_items >= 2 * num_sms(device), group <= LIGHT_GROUP
    return DecodeConfig(
        block_keys=keys,
        num_stages=7 if is_many else 11,
        num_warps=4,
        programs_per_sm=2 if is_many else 1,
        merge="ticket" if is_many or is_light else "kernel",
        late=8 if is_many and is_light else 0,
        late_runs=2,
    )


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

    def num_main_runs(self, config: DecodeConfig, device: torch.device) -> int:
        """Runs that start together, one for each program of a head.

        A power of two where that leaves few multiprocessors out: runs of many sequences of one length then end where sequences do.
        """
        most = max(1, config.programs_per_sm * num_sms(device) // self.num_kv_heads)
        even = 1 << (most.bit_length() - 1)
        return even if EVEN_SHARE * even >= (EVEN_SHARE - 1) * most else most

    def num_runs(self, config: DecodeConfig, device: torch.device) -> int:
        return self.num_main_runs(config, device) * (1 + config.late_runs if config.late else 1)

    def max_tiles(self, config: DecodeConfig) -> int:
        """Of all sequences of one head, whatever their lengths."""
        return self.num_sequences * max(1, -(-self.max_blocks * self.block_tokens // config.block_keys))

    def num_slots(self, config: DecodeConfig, device: torch.device) -> int:
        """The most that pieces of any lengths take of one head: a slot's number is the sequence's plus the run's or the chunk's."""
        if self.chunk_tokens is None:
            return self.num_sequences + self.num_runs(config, device)
        return self.num_sequences + -(-self.max_tiles(config) // (self.chunk_tokens // config.block_keys))


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeWorkspace:
    """Pieces of one call: allocated once by the caller, reused by every later call on the same stream. Tickets are zero between calls."""

    acc_UNGD: Tensor
    max_UNG: Tensor
    sum_UNG: Tensor
    tickets_SN: Tensor


def decode_workspace(shape: DecodeShape, device: torch.device, config: DecodeConfig | None = None) -> DecodeWorkspace:
    """Room for the pieces of any call of this shape, or of fewer sequences, with this configuration; without one, with any table's."""
    num_n, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    config = config or replace(shape.config(device), programs_per_sm=MOST_PROGRAMS_PER_SM, late=2, late_runs=MOST_LATE_RUNS)
    slots = shape.num_slots(config, device)
    return DecodeWorkspace(
        acc_UNGD=torch.empty(slots, num_n, group, shape.head_dim, dtype=torch.float32, device=device),
        max_UNG=torch.empty(slots, num_n, group, dtype=torch.float32, device=device),
        sum_UNG=torch.empty(slots, num_n, group, dtype=torch.float32, device=device),
        tickets_SN=torch.zeros(shape.num_sequences, num_n, dtype=torch.int32, device=device),
    )


def check_workspace(workspace: DecodeWorkspace, shape: DecodeShape, config: DecodeConfig, device: torch.device) -> None:
    num_n, group, slots = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.num_slots(config, device)
    check("workspace.acc", workspace.acc_UNGD, torch.float32, None, num_n, group, shape.head_dim, device=device)
    check("workspace.max", workspace.max_UNG, torch.float32, None, num_n, group, device=device)
    check("workspace.sum", workspace.sum_UNG, torch.float32, None, num_n, group, device=device)
    check("workspace.tickets", workspace.tickets_SN, torch.int32, None, num_n, device=device)
    held = min(workspace.acc_UNGD.shape[0], workspace.max_UNG.shape[0], workspace.sum_UNG.shape[0])
    assert held >= slots, f"workspace holds {held} slots, this shape may need {slots}"
    assert workspace.tickets_SN.shape[0] >= shape.num_sequences, "workspace has too few tickets"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodePlan:
    """The cut of one step, written on the device by decode_plan and read by the attention of every layer. Nothing of it comes to the host.

    words_T: of every tile, seq << 42 | live keys << 32 | mark; mark 0: the piece goes on; 1: the sequence ends here and is whole;
    2 + slot: the piece ends here and goes to that slot. tiles_T: the upper half alone, for whoever loads ahead. blocks_TB: the blocks that
    hold the tile's keys; where a block holds several tiles, one number, block * tiles of a block + which of them. runs_C8: start, stop
    (tiles), then of the sequence of the first piece and of that of the last one the sequence, its first slot and its count of pieces;
    zeros where nobody shares it, or where the last is the first. merges_S2: first slot and count of pieces.
    """

    shape: DecodeShape
    config: DecodeConfig
    words_T: Tensor
    tiles_T: Tensor
    blocks_TB: Tensor
    runs_C8: Tensor
    merges_S2: Tensor

    @property
    def chunk_tiles(self) -> int:
        return 0 if self.shape.chunk_tokens is None else self.shape.chunk_tokens // self.config.block_keys


def allocate_plan(shape: DecodeShape, device: torch.device, config: DecodeConfig | None = None) -> DecodePlan:
    """Room for the plan of any lengths up to max_blocks * block_tokens. Whoever steps owns it: one for each number of sequences."""
    config = config or shape.config(device)
    chunk = shape.chunk_tokens
    assert chunk is None or (chunk > 0 and chunk % config.block_keys == 0), f"chunk_tokens {chunk}: a multiple of {config.block_keys}"
    tiles = shape.max_tiles(config)
    return DecodePlan(
        shape=shape,
        config=config,
        words_T=torch.empty(tiles, dtype=torch.int64, device=device),
        tiles_T=torch.empty(tiles, dtype=torch.int32, device=device),
        blocks_TB=torch.empty(tiles, max(1, config.block_keys // shape.block_tokens), dtype=torch.int32, device=device),
        runs_C8=torch.empty(shape.num_runs(config, device), RUN_WORDS, dtype=torch.int32, device=device),
        merges_S2=torch.empty(shape.num_sequences, 2, dtype=torch.int32, device=device),
    )


@triton.jit
def merge(acc_ptr, max_ptr, sum_ptr, slot, count, head, row_R, N: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """Query heads row_R of an item [R, D]: its pieces in their order, PIECES at a time. L1 may hold an earlier call's: loads pass by it."""
    lane_U = tl.arange(0, PIECES)
    lane_D = tl.arange(0, D)
    top_R = tl.full(row_R.shape, float("-inf"), tl.float32)
    sum_R = tl.zeros(row_R.shape, tl.float32)
    acc_RD = tl.zeros((row_R.shape[0], D), tl.float32)
    for at in tl.range(0, count, PIECES, num_stages=1):  # not prefetched: copies of 4 bytes would go through L1
        live_UR = (at + lane_U < count)[:, None] & (row_R < G)[None, :]
        at_UR = ((slot + at + lane_U).to(tl.int64)[:, None] * N + head) * G + row_R[None, :]
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
    merges_ptr,
    out_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (sequence, kv head, one of PARTS parts of its query heads): adds the pieces of an item that has several.

    The plan is read before the wait: the attention kernel lets this one start only once it has itself waited for all before it. From L2:
    L1 may hold the line of an earlier step.
    """
    item = tl.program_id(0) // PARTS
    row_R = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    slot = tl.load(merges_ptr + item // N * 2, cache_modifier=".cg")
    count = tl.load(merges_ptr + item // N * 2 + 1, cache_modifier=".cg")
    wait_for_previous(USE_PDL)
    start_next(USE_PDL)
    if count > 1:
        out_RD = merge(acc_ptr, max_ptr, sum_ptr, slot, count, item % N, row_R, N, G, D, PIECES)
        at_RD = (item.to(tl.int64) * G + row_R)[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(out_ptr + at_RD, out_RD.to(out_ptr.dtype.element_ty), mask=row_R[:, None] < G)


def merge_by_kernel(plan: DecodePlan, workspace: DecodeWorkspace, out_SHD: Tensor) -> None:
    """As many programs as are there at one time, where items are that few: those that wait for a place come late."""
    shape, device = plan.shape, out_SHD.device
    group, items = shape.num_heads // shape.num_kv_heads, shape.num_sequences * shape.num_kv_heads
    padded = triton.next_power_of_2(group)
    rows = min(padded, triton.next_power_of_2(triton.cdiv(items * padded, MERGES_PER_SM * num_sms(device))))
    merge_kernel[(items * padded // rows,)](
        *(plan.merges_S2, out_SHD, workspace.acc_UNGD, workspace.max_UNG, workspace.sum_UNG),
        N=shape.num_kv_heads,
        G=group,
        D=shape.head_dim,
        ROWS=rows,
        PARTS=padded // rows,
        PIECES=max(1, MERGE_ROWS // rows),
        num_warps=4,
        **pdl_options(device),
    )
