"""Owns the measurement of what surrounds the experts: the gate, decode attention, the rest of a layer. Knows no whole MoE layer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.compile_ahead import compile_ahead
from bench.gpu_stopwatch import Options, Row, floor_us, interleaved_us, num_sets
from bench.kernels import peers_vllm
from bench.kernels.layer_reference import choose
from bench.kernels.layer_section import Run
from bench.kernels.shapes import LayerShape, make_logits, seeded
from bench.kernels.targets import OURS, Case
from duomo_kernels._bounds import bound, error
from duomo_kernels._decode_pieces import DecodeConfig, DecodeShape, allocate_plan, decode_workspace
from duomo_kernels._routing import Routing, routing_reference
from duomo_kernels.decode_attention import decode_attention, decode_attention_reference
from duomo_kernels.decode_plan import decode_plan
from duomo_kernels.gate import gate

CHAIN = 50  # calls of a small operation in one graph, each after the one before
GATE_TILE_ROWS = 128
REFERENCE_TOKENS = 1024  # up to which tiles are held against the definition, which is plain Python
BLOCK_TOKENS = 64  # the engine's on a GPU
PAGE_TOKENS = 16  # vLLM's
POOL_BYTES = 6 << 30  # of keys and values: FlashAttention's copy stands beside them
REST = (
    "add_rms_norm",
    "qk_rope_write",
    "expert_combine",
    "quantise_rows_fp8",
    "sample",
    "token_logprobs",
    "prefill_attention",
    "kv_hash_pack",
    "kv_fp8_pack",
)


def measure_gate(run: Run, shape: LayerShape) -> list[Case]:
    """From logits to the routing tensors, warm, as one of a chain; vLLM: topk_softmax and moe_align with the tile height it would use."""
    generator = seeded(11, run.device)
    tokens = [t for t in shape.tokens if run.wants(t)]
    logits = {t: make_logits(shape, t, "uniform", generator) for t in tokens}

    def ours(t: int) -> Routing:
        return gate(logits[t], shape.rule, tile_rows=GATE_TILE_ROWS)

    compile_ahead([partial(ours, t) for t in tokens])
    found = []
    for t in tokens:
        case = Case(section="gate", shape=shape.name, tokens=t)
        if not run.has_time(case):
            continue
        choice = choose(logits[t], shape.rule)
        routing = ours(t)
        red = _gate_problem(routing, choice.ids_TK, choice.weights_TK)
        num_bytes = logits[t].nbytes + t * shape.top_k * 16 + shape.num_experts * 8
        case = replace(case, distinct=float(choice.num_distinct), floor_us=floor_us(num_bytes), red=red)
        if not red:
            sides: dict[str, list[Callable[[], object]]] = {OURS: [partial(ours, t)] * CHAIN}
            if peers_vllm.why_absent() is None:
                block_m = 16 if t <= 32 else 64 if t <= 512 else 128
                sides["vllm"] = [partial(peers_vllm.gate_and_align, logits[t], shape.rule, block_m)] * CHAIN
            wrong = error(routing.weights_TK, choice.weights_TK)
            case = replace(case, times=interleaved_us(sides, repeats=run.repeats), error=wrong)
        found.append(case)
    return found


def _gate_problem(routing: Routing, ids_TK: Tensor, weights_TK: Tensor) -> str:
    """What is wrong with a routing, or nothing: choices, weights, histogram, order and its inverse; offsets and tiles up to some size."""
    num_experts = routing.num_experts
    if not torch.equal(routing.ids_TK.long(), ids_TK):
        return f"{int((routing.ids_TK.long() != ids_TK).sum())} choices differ"
    if (wrong := error(routing.weights_TK, weights_TK)) > bound(torch.float32):
        return f"weights: error {wrong:.2e}"
    if not torch.equal(routing.counts_E.long(), torch.bincount(ids_TK.flatten(), minlength=num_experts)):
        return "the histogram differs"
    order_R = ids_TK.flatten().sort(stable=True).indices
    if not torch.equal(routing.routed_R.long(), order_R):
        return "the order differs"
    if not torch.equal(routing.place_R.long(), order_R.argsort()):
        return "the places differ"
    return _tile_problem(routing, ids_TK, weights_TK) if ids_TK.shape[0] <= REFERENCE_TOKENS else ""


def _tile_problem(routing: Routing, ids_TK: Tensor, weights_TK: Tensor) -> str:
    """What is wrong with offsets and tiles, or nothing; rows past the last tile hold anything."""
    right = routing_reference(ids_TK, weights_TK, routing.num_experts, routing.tile_rows)
    if not torch.equal(routing.offsets_E1, right.offsets_E1):
        return "the offsets differ"
    if not torch.equal(routing.num_tiles, right.num_tiles):
        return f"{int(routing.num_tiles)} tiles, not {int(right.num_tiles)}"
    num_tiles = int(right.num_tiles)
    return "" if torch.equal(routing.tiles_M5[:num_tiles], right.tiles_M5[:num_tiles]) else "the tiles differ"


@dataclass(frozen=True, slots=True)
class Contexts:
    """A batch of decoding sequences."""

    name: str
    lengths: tuple[int, ...]


BATCHES = (
    *(Contexts(f"{batch} x {context}", (context,) * batch) for batch in (1, 8, 32, 64, 128, 256) for context in (1024, 4096, 32768)),
    Contexts("1 x 32768 + 31 x 1024", (32768, *(1024,) * 31)),
)


def attention_calls(
    shape: LayerShape, batch: Contexts, device: torch.device
) -> tuple[DecodeConfig, Callable[[DecodeConfig], list[Callable[[], Tensor]]]] | None:
    """The heuristic's configuration, and the calls of any other, one a set; None where the keys do not fit."""
    num_bytes = _pool_bytes(shape, batch)
    if num_bytes > POOL_BYTES:
        return None
    sets = _make_sets(shape, batch, device)
    return _cut(shape, sets[0]).heuristic(device), lambda config: _calls(shape, sets, config)


def _calls(shape: LayerShape, sets: list[_Cache], config: DecodeConfig | None) -> list[Callable[[], Tensor]]:
    """One a set. Plans are made here, as the peer's schedule is: once a step, for all layers."""
    device, cut = sets[0].pool.device, _cut(shape, sets[0])
    workspace, scale = decode_workspace(cut, device, config), shape.head_dim**-0.5
    plans = [decode_plan(s.lengths_S, s.table_SB, allocate_plan(cut, device, config)) for s in sets]
    return [
        partial(decode_attention, s.q_SHD, s.pool, plan, scale=scale, workspace=workspace, is_settled=True)
        for s, plan in zip(sets, plans, strict=True)
    ]


def _pool_bytes(shape: LayerShape, batch: Contexts) -> int:
    return sum(batch.lengths) * 2 * shape.num_kv_heads * shape.head_dim * 2


def _make_sets(shape: LayerShape, batch: Contexts, device: torch.device) -> list[_Cache]:
    """Enough that each call is cold, as far as memory goes."""
    num_bytes = _pool_bytes(shape, batch)
    return [
        _make_cache(shape, batch, seed, device) for seed in range(min(num_sets(num_bytes, at_most=64), max(1, POOL_BYTES // num_bytes)))
    ]


def _cut(shape: LayerShape, one: _Cache) -> DecodeShape:
    return DecodeShape(
        num_sequences=one.q_SHD.shape[0],
        num_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_tokens=BLOCK_TOKENS,
        max_blocks=one.table_SB.shape[1],
    )


def measure_attention(run: Run, shape: LayerShape) -> list[Case]:
    """One query a sequence over paged keys and values, cold; FlashAttention 3 with its schedule made outside."""
    found = []
    for batch in BATCHES:
        num_bytes = _pool_bytes(shape, batch)
        case = Case(section="attention", shape=shape.name, tokens=len(batch.lengths), detail=batch.name)
        if not shape.num_kv_heads or num_bytes > POOL_BYTES or not run.wants(case.tokens) or not run.has_time(case):
            continue
        sets = _make_sets(shape, batch, run.device)
        ours, scale = _calls(shape, sets, None), shape.head_dim**-0.5
        some = torch.linspace(0, case.tokens - 1, min(8, case.tokens)).long().to(run.device)
        one = sets[0]
        expected = decode_attention_reference(one.q_SHD[some], one.pool, one.table_SB[some], one.lengths_S[some], scale)
        out = ours[0]()
        wrong = error(out[some], expected)
        case = replace(case, floor_us=floor_us(num_bytes + 4 * one.q_SHD.numel()), error=wrong)
        if wrong > bound(torch.bfloat16) or not bool(torch.isfinite(out).all()):
            found.append(replace(case, red=f"error {wrong:.2e}"))
            continue
        sides: dict[str, list[Callable[[], object]]] = {OURS: list(ours)}
        peers = [_peers(s, scale) for s in sets]
        there = [peer for peer in peers if not isinstance(peer, str)]
        notes = sorted({f"FlashAttention 3: {peer}" for peer in peers if isinstance(peer, str)})
        for name in there[0] if there else ():
            theirs = error(there[0][name]()[some], expected)
            if theirs <= bound(torch.bfloat16):
                sides[name] = [peer[name] for peer in there]
            else:
                notes.append(f"{name} left out: error {theirs:.2e}")
        found.append(replace(case, times=interleaved_us(sides, repeats=run.repeats), notes=tuple(notes)))
    return found


def _peers(one: _Cache, scale: float) -> dict[str, Callable[[], Tensor]] | str:
    """FlashAttention 3 over the same keys in pages of its own usual size, and of ours."""
    num_parts = BLOCK_TOKENS // PAGE_TOKENS
    num_blocks, _, num_heads, _, head_dim = one.pool.shape
    pages = one.pool.view(num_blocks, 2, num_heads, num_parts, PAGE_TOKENS, head_dim).permute(0, 3, 1, 2, 4, 5).flatten(0, 1)
    parts = torch.arange(num_parts, dtype=torch.int32, device=one.table_SB.device)
    table_SB = (one.table_SB[:, :, None] * num_parts + parts).flatten(1)
    found = peers_vllm.decode_attention(one.q_SHD, pages, table_SB, one.lengths_S, scale)
    large = peers_vllm.decode_attention(one.q_SHD, one.pool, one.table_SB, one.lengths_S, scale)
    if isinstance(found, str) or isinstance(large, str):
        return found if isinstance(found, str) else str(large)
    return found | {f"{name}_pages_of_{BLOCK_TOKENS}": call for name, call in large.items()}


@dataclass(frozen=True, slots=True)
class _Cache:
    q_SHD: Tensor
    pool: Tensor
    table_SB: Tensor
    lengths_S: Tensor


def _make_cache(shape: LayerShape, batch: Contexts, seed: int, device: torch.device) -> _Cache:
    """Blocks lie in shuffled order, as after hours of service."""
    generator = seeded(seed, device)
    blocks = [-(-length // BLOCK_TOKENS) for length in batch.lengths]
    order = torch.randperm(sum(blocks), generator=generator, device=device, dtype=torch.int64).int()
    table_SB = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
    for s, part in enumerate(order.split(blocks)):  # type: ignore[no-untyped-call]  # torch ships no types for it
        table_SB[s, : len(part)] = part
    size = (sum(blocks), 2, shape.num_kv_heads, BLOCK_TOKENS, shape.head_dim)
    pool = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    query = torch.empty(len(blocks), shape.num_q_heads, shape.head_dim, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    return _Cache(query, pool, table_SB, torch.tensor(batch.lengths, dtype=torch.int32, device=device))


def measure_rest(run: Run) -> list[Case]:
    """What the operations' own benches measure (bench_<op>.py), for those that are here."""
    found = []
    for op in REST:
        if not run.has_time(f"rest {op}"):
            continue
        try:
            measure: Callable[[Options], list[Row]] = importlib.import_module(f"bench.kernels.bench_{op}").measure
        except ModuleNotFoundError as missing:
            run.left_out.append(f"rest {op} ({missing})")
            continue
        try:
            rows = measure(Options(repeats=run.repeats))
        except (SystemExit, RuntimeError, AssertionError) as problem:
            found.append(Case(section="rest", shape=op, tokens=0, red=f"{type(problem).__name__}: {problem}"))
            continue
        found += [
            Case(section="rest", shape=op, tokens=0, detail=row.case, floor_us=row.floor_us, times=row.times, error=row.error or 0.0)
            for row in rows
        ]
    return found
