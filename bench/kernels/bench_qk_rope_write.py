"""QK norm, rope and the write of K and V in one launch, against torch's operations one after the other. Floor: every byte once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, checked, gpu_bench, interleaved_us, num_sets
from duomo_kernels.norm_rope import rope_tables
from duomo_kernels.qk_rope_write import QkNorm, RopeTables, qk_rope_write, qk_rope_write_reference

BF16 = torch.bfloat16
BLOCK_TOKENS = 16
POSITIONS = 8192
TOKENS = (1, 64, 256, 4096, 16_384)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """Heads of a model; norm is none, head or whole."""

    name: str
    heads: int
    kv_heads: int
    norm: str
    dim: int = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call's tensors, outputs too."""

    qkv_TC: Tensor
    pool: Tensor
    slot_T: Tensor
    position_T: Tensor
    tables: RopeTables
    norm: QkNorm | None
    q_THD: Tensor


MODELS = [
    Model(name="OLMoE", heads=16, kv_heads=16, norm="whole"),
    Model(name="Qwen3-30B", heads=32, kv_heads=4, norm="head"),
    Model(name="Mixtral", heads=32, kv_heads=8, norm="none"),
]


def peer(given: Inputs, model: Model) -> None:
    """What a plain model does: split, norm, rotate q and k in float32, write by index."""
    qkv_THD = given.qkv_TC.view(len(given.qkv_TC), -1, model.dim)
    q, k, v = qkv_THD[:, : model.heads], qkv_THD[:, model.heads : -model.kv_heads], qkv_THD[:, -model.kv_heads :]
    if given.norm:
        q, k = _norm(q, given.norm.q_weight, given.norm.eps), _norm(k, given.norm.k_weight, given.norm.eps)
    cos, sin = (table[given.position_T].unsqueeze(1) for table in (given.tables.cos_PD, given.tables.sin_PD))
    given.q_THD.copy_(q * cos + q.roll(model.dim // 2, -1) * sin)
    block, offset = given.slot_T // BLOCK_TOKENS, given.slot_T % BLOCK_TOKENS
    given.pool[block, 0, :, offset] = (k * cos + k.roll(model.dim // 2, -1) * sin).to(BF16)
    given.pool[block, 1, :, offset] = v


def _norm(x_THD: Tensor, weight: Tensor, eps: float) -> Tensor:
    row = x_THD if weight.numel() == x_THD.shape[-1] else x_THD.flatten(1)
    return torch.nn.functional.rms_norm(row, row.shape[-1:], weight, eps).view(x_THD.shape)


def measure(options: Options) -> list[Row]:
    tables = _tables()
    rows = []
    for model in MODELS:
        for tokens in TOKENS:
            case = f"{model.name} {tokens} tokens"
            if options.only in case:
                rows.append(_row(case, model, tokens, tables, options))
    return rows


def _tables() -> RopeTables:
    cos_PD, sin_PD = rope_tables(POSITIONS, 128, 1e6)
    return RopeTables(cos_PD=cos_PD.cuda(), sin_PD=sin_PD.cuda())


def _row(case: str, model: Model, tokens: int, tables: RopeTables, options: Options) -> Row:
    heads = model.heads + 2 * model.kv_heads
    num_bytes = (
        4 * tokens * heads * model.dim + 4 * tokens * model.dim + 12 * tokens
    )  # in and out, cos and sin's halves, positions and slots
    sets = [_inputs(model, tokens, tables) for _ in range(num_sets(num_bytes))]
    one = sets[0]
    few = min(tokens, 256)  # the reference walks tokens in Python
    q_ref, pool_ref = qk_rope_write_reference(
        one.qkv_TC[:few], model.heads, one.pool, one.slot_T[:few], one.position_T[:few], tables, one.norm
    )
    wrong = checked("qk_rope_write", _ours(one, model)[:few], q_ref)
    block, offset = one.slot_T[:few] // BLOCK_TOKENS, one.slot_T[:few] % BLOCK_TOKENS
    wrong = max(wrong, checked("qk_rope_write, pool", one.pool[block, :, :, offset], pool_ref[block, :, :, offset]))
    calls: dict[str, list[Call]] = {
        "ours": [partial(_ours, each, model) for each in sets],
        "torch": [partial(peer, each, model) for each in sets],
    }
    return Row(case=case, times=interleaved_us(calls, repeats=options.repeats), num_bytes=num_bytes, error=wrong)


def _ours(given: Inputs, model: Model) -> Tensor:
    return qk_rope_write(
        given.qkv_TC, model.heads, given.pool, given.slot_T, given.position_T, given.tables, given.norm, out_THD=given.q_THD
    )


def _inputs(model: Model, tokens: int, tables: RopeTables) -> Inputs:
    def weight(heads: int) -> Tensor:
        return torch.randn(model.dim * (1 if model.norm == "head" else heads), device="cuda", dtype=BF16)

    blocks = -(-tokens // BLOCK_TOKENS) + 1
    norm = None if model.norm == "none" else QkNorm(q_weight=weight(model.heads), k_weight=weight(model.kv_heads), eps=1e-6)
    columns = (model.heads + 2 * model.kv_heads) * model.dim
    # a wave of prompts fills whole blocks, which lie anywhere
    slot_T = (torch.randperm(blocks, device="cuda")[:, None] * BLOCK_TOKENS + torch.arange(BLOCK_TOKENS, device="cuda")).flatten()[:tokens]
    return Inputs(
        qkv_TC=torch.randn(tokens, columns, device="cuda", dtype=BF16),
        pool=torch.zeros(blocks, 2, model.kv_heads, BLOCK_TOKENS, model.dim, device="cuda", dtype=BF16),
        slot_T=slot_T.contiguous(),
        position_T=torch.arange(tokens, device="cuda", dtype=torch.int32) % POSITIONS,
        tables=tables,
        norm=norm,
        q_THD=torch.empty(tokens, model.heads, model.dim, device="cuda", dtype=BF16),
    )


if __name__ == "__main__":
    gpu_bench("qk_rope_write", measure)
