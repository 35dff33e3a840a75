"""Decode attention over paged keys against FlashAttention 3 (vLLM's build, where importable), in one run. Floor: keys and values once.

Sides of one case read the same bytes: one buffer a set, seen as blocks of 16, 64 or 128 tokens by ours and as vLLM's pages by the peer.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, checked, gpu_bench, interleaved_us, l2_size, num_sets
from duomo_kernels._decode_pieces import DecodeConfig, DecodePlan, DecodeShape, allocate_plan, decode_workspace
from duomo_kernels.decode_attention import decode_attention, decode_attention_reference
from duomo_kernels.decode_plan import decode_plan

PAGE_TOKENS = 16  # vLLM's default
CHUNK_TOKENS = 1024  # of the batch-invariant side
Reader = Callable[["Inputs"], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Heads and lengths of one step of one layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: list[int]

    @property
    def num_bytes(self) -> int:
        return sum(self.lengths) * 4 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One set: q [S, H, D], room for all keys and values, and a shuffled table for 16-token blocks from which the others follow."""

    case: Case
    q_SHD: Tensor
    room: Tensor
    lengths_S: Tensor
    tables: dict[int, Tensor]


def cases() -> list[Case]:
    found = [_case(32, 4, 128, [length] * batch) for length, batches in _GRID for batch in batches]
    found += [_case(16, 16, 128, [length] * batch) for length, batches in ((1024, (1, 32, 256)), (8192, (1, 32))) for batch in batches]
    found += [_case(32, 8, 64, [2048] * 32)]
    mixed = [32_768] + [1024] * 31
    found += [_case(32, 4, 128, mixed, "1 x 32k + 31 x 1k"), _case(16, 16, 128, mixed, "1 x 32k + 31 x 1k")]
    found += [_case(32, 4, 128, [200 + 61 * (i * 37 % 128) for i in range(128)], "128 of 0.2k to 8k")]
    return found


_GRID = ((1024, (1, 8, 32, 64, 128, 256)), (4096, (1, 32, 128)), (32_768, (1, 8, 32)))


def _case(num_heads: int, num_kv_heads: int, head_dim: int, lengths: list[int], what: str = "") -> Case:
    what = what or f"{len(lengths)} x {lengths[0]}"
    name = f"{num_heads}/{num_kv_heads} x {head_dim}: {what}"
    return Case(name=name, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, lengths=lengths)


def make_inputs(case: Case) -> Inputs:
    """Blocks of every size are shuffled over the whole buffer, as an allocator leaves them."""
    num_sequences, longest = len(case.lengths), max(case.lengths)
    width = -(-longest // 128) * 128
    tokens = sum(-(-length // 128) * 128 for length in case.lengths)
    room = torch.randn(tokens * 2 * case.num_kv_heads * case.head_dim, device="cuda", dtype=torch.bfloat16)
    tables = {}
    for block_tokens in (16, 64, 128):
        order = torch.randperm(tokens // block_tokens).to(torch.int32)
        table_SB = torch.zeros(num_sequences, width // block_tokens, dtype=torch.int32)
        at = 0
        for s, length in enumerate(case.lengths):
            used = -(-length // 128) * 128 // block_tokens
            table_SB[s, :used] = order[at : at + used]
            at += used
        tables[block_tokens] = table_SB.cuda()
    q_SHD = torch.randn(num_sequences, case.num_heads, case.head_dim, device="cuda", dtype=torch.bfloat16)
    return Inputs(case=case, q_SHD=q_SHD, room=room, lengths_S=torch.tensor(case.lengths, dtype=torch.int32).cuda(), tables=tables)


def pool_of(inputs: Inputs, block_tokens: int) -> Tensor:
    return inputs.room.view(-1, 2, inputs.case.num_kv_heads, block_tokens, inputs.case.head_dim)


def ours(
    case: Case,
    block_tokens: int,
    chunk_tokens: int | None = None,
    change: Callable[[DecodeConfig], DecodeConfig] | None = None,
    is_settled: bool = True,
) -> Reader:
    """A reader with its own workspace, output and plans, as an engine holds them. A plan is made once a step: outside the timing."""
    device = torch.device("cuda")
    shape = shape_of(case, block_tokens, chunk_tokens)
    config = (change or (lambda same: same))(shape.config(device))
    workspace = decode_workspace(shape, device, config)
    out = torch.empty(len(case.lengths), case.num_heads, case.head_dim, device=device, dtype=torch.bfloat16)
    plans: dict[int, DecodePlan] = {}

    def read(inputs: Inputs) -> Tensor:
        if id(inputs) not in plans:
            plans[id(inputs)] = decode_plan(inputs.lengths_S, inputs.tables[block_tokens], allocate_plan(shape, device, config))
        plan, scale = plans[id(inputs)], case.head_dim**-0.5
        return decode_attention(
            inputs.q_SHD, pool_of(inputs, block_tokens), plan, scale=scale, workspace=workspace, is_settled=is_settled, out=out
        )

    return read


def shape_of(case: Case, block_tokens: int, chunk_tokens: int | None = None) -> DecodeShape:
    return DecodeShape(
        num_sequences=len(case.lengths),
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        block_tokens=block_tokens,
        max_blocks=-(-max(case.lengths) // 128) * 128 // block_tokens,
        chunk_tokens=chunk_tokens,
    )


def flash_attention_3(case: Case, page_tokens: int) -> Reader:
    """vLLM's FlashAttention 3 over pages, with the scheduler's metadata that vLLM makes once a step. Raises where it is absent."""
    module: ModuleType = importlib.import_module("vllm.vllm_flash_attn")
    num_sequences, longest = len(case.lengths), max(case.lengths)
    cu_seqlens = torch.arange(num_sequences + 1, device="cuda", dtype=torch.int32)
    out = torch.empty(num_sequences, case.num_heads, case.head_dim, device="cuda", dtype=torch.bfloat16)
    lengths_S = torch.tensor(case.lengths, dtype=torch.int32).cuda()
    metadata = module.get_scheduler_metadata(
        batch_size=num_sequences,
        max_seqlen_q=1,
        max_seqlen_k=longest,
        num_heads_q=case.num_heads,
        num_heads_kv=case.num_kv_heads,
        headdim=case.head_dim,
        cache_seqlens=lengths_S,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=cu_seqlens,
        page_size=page_tokens,
        causal=True,
    )

    def read(inputs: Inputs) -> Tensor:
        k, v = inputs.room.view(2, -1, page_tokens, case.num_kv_heads, case.head_dim)
        module.flash_attn_varlen_func(
            q=inputs.q_SHD,
            k=k,
            v=v,
            max_seqlen_q=1,
            cu_seqlens_q=cu_seqlens,
            max_seqlen_k=longest,
            seqused_k=inputs.lengths_S,
            softmax_scale=case.head_dim**-0.5,
            causal=True,
            block_table=inputs.tables[page_tokens],
            out=out,
            scheduler_metadata=metadata,
            fa_version=3,
        )
        return out

    return read


def readers(case: Case, inputs: Inputs) -> tuple[dict[str, Reader], dict[str, float | str]]:
    """Our sides, every peer that works here, and why the others do not."""
    found: dict[str, Reader] = {
        "ours": ours(case, 64),
        "ours, other merge": ours(case, 64, None, _other_merge),
        "ours, chunks": ours(case, 64, CHUNK_TOKENS),
        **{f"ours, {name}": ours(case, 64, None, change) for name, change in _OTHER_CONFIGS.items()},
        "ours, blocks of 16": ours(case, 16),
        "ours, blocks of 128": ours(case, 128),
    }
    absent: dict[str, float | str] = {}
    for name, page_tokens in (("fa3", PAGE_TOKENS), ("fa3, pages of 128", 128)):
        try:
            read = flash_attention_3(case, page_tokens)
            read(inputs)
            found[name] = read
        except Exception as reason:  # a peer that is not here is a line of the result, not the end of it
            absent[name] = f"unavailable: {reason!r}"[:200]
    return found, absent


def _other_merge(config: DecodeConfig) -> DecodeConfig:
    return replace(config, merge="kernel" if config.merge == "ticket" else "ticket")


def _wide(config: DecodeConfig) -> DecodeConfig:
    """Twice the keys and the warps of a tile, three of them in flight."""
    return replace(config, block_keys=2 * config.block_keys, num_stages=7, num_warps=8)


def _pair(config: DecodeConfig) -> DecodeConfig:
    """Two programs a multiprocessor, three tiles in flight in each."""
    return replace(config, num_stages=7, programs_per_sm=2)


def _late(config: DecodeConfig) -> DecodeConfig:
    """The same, a sixteenth of the tiles left to short runs."""
    return replace(_pair(config), late=16)


_OTHER_CONFIGS = {"wide tiles": _wide, "two programs": _pair, "two programs, late runs": _late}


def spot_check(case: Case, inputs: Inputs, name: str, read: Reader) -> float:
    """The longest sequence and three others against float64."""
    out = read(inputs)
    chosen = sorted(range(len(case.lengths)), key=lambda s: -case.lengths[s])
    rows = torch.tensor(sorted({chosen[0], chosen[-1], chosen[len(chosen) // 2], 0}), device="cuda")
    if name.startswith("fa3"):
        page = PAGE_TOKENS if name == "fa3" else 128
        pool = inputs.room.view(2, -1, page, case.num_kv_heads, case.head_dim).permute(1, 0, 3, 2, 4)
    else:
        page = int(name.rsplit(" ", 1)[1]) if "blocks of" in name else 64
        pool = pool_of(inputs, page)
    ref = decode_attention_reference(inputs.q_SHD[rows], pool, inputs.tables[page][rows], inputs.lengths_S[rows], case.head_dim**-0.5)
    return checked(f"{case.name}, {name}", out[rows], ref)


def measure(options: Options) -> list[Row]:
    rows = []
    for case in cases():
        if options.only not in case.name:
            continue
        # a set far larger than L2 leaves nothing of itself there
        sets = [make_inputs(case) for _ in range(1 if case.num_bytes > 10 * l2_size() else num_sets(case.num_bytes, at_most=64))]
        sides, absent = readers(case, sets[0])
        errors = {name: spot_check(case, sets[0], name, read) for name, read in sides.items()}
        calls: dict[str, list[Call]] = {name: [partial(read, one) for one in sets] for name, read in sides.items()}
        times = interleaved_us(calls, repeats=options.repeats)
        num_flop = 4.0 * sum(case.lengths) * case.num_heads * case.head_dim
        rows.append(Row(case=case.name, times=times, num_bytes=case.num_bytes, num_flop=num_flop, error=errors["ours"], about=absent))
        print(rows[-1].line(), flush=True)
        del sets, calls
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    gpu_bench("decode_attention", measure)
