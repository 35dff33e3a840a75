"""Owns the peers of the kernels: vLLM's operations, called as its layers call them, and torch's grouped GEMM. Knows no kernel of ours.

vLLM 0.24.0 is looked for on sys.path, then in the folder that DUOMO_BENCH_VLLM names; without it the benches go on and say so. Its layer
in bf16 is `fused_experts` (align, product, activation, product, sum), the Triton backend that it picks on Hopper; the block-scaled fp8
layer is what its TritonExperts run: quantise, align, product, activation with quantisation in one, product, sum.

    as shipped     the tile configuration that vLLM picks; no tuned file exists for these shapes on an H100
    re-tuned       the best found by `duomo bench tune` within the same budget as ours (bench/results/vllm_tuned.json)

Legend: T tokens, K experts a token, E experts, D model, F expert hidden, S sequences, H query heads, N kv heads.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.gpu_stopwatch import RESULTS
from duomo_kernels._routing import GateRule
from duomo_kernels._weights import ExpertWeights

FOLDER_VARIABLE = "DUOMO_BENCH_VLLM"
TUNED = RESULTS / "vllm_tuned.json"
MAX_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph
TileConfig = dict[str, int]  # vLLM's: BLOCK_SIZE_M, BLOCK_SIZE_N, BLOCK_SIZE_K, GROUP_SIZE_M, num_warps, num_stages


@dataclass(frozen=True, slots=True)
class _Modules:
    """The parts of vLLM that are called."""

    version: str
    ops: ModuleType
    moe: ModuleType
    moe_room: ModuleType
    align: ModuleType
    fp8: ModuleType


@functools.cache
def _vllm() -> _Modules | str:
    """vLLM's modules, or why there are none."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0")  # its scales are powers of two and its kernels want nvcc at run time
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)
    room = "vllm.model_executor.layers.fused_moe"
    try:
        return _Modules(
            version=importlib.import_module("vllm").__version__,
            ops=importlib.import_module("vllm._custom_ops"),
            moe=importlib.import_module(f"{room}.fused_moe"),
            moe_room=importlib.import_module(room),
            align=importlib.import_module(f"{room}.moe_align_block_size"),
            fp8=importlib.import_module("vllm.model_executor.layers.quantization.utils.fp8_utils"),
        )
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def why_absent() -> str | None:
    """None where vLLM can be called, else the reason."""
    found = _vllm()
    return found if isinstance(found, str) else None


def version() -> str:
    found = _vllm()
    return "absent" if isinstance(found, str) else found.version


def _modules() -> _Modules:
    found = _vllm()
    assert not isinstance(found, str), f"vLLM is absent ({found}): ask why_absent() first"
    return found


def gate(logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """vLLM's topk_softmax, or grouped_topk where the rule has groups: weights [T, K] float32, ids [T, K] int32."""
    ops = _modules().ops
    if rule.scoring == "sigmoid":
        bias_E = logits_TE.new_zeros(logits_TE.shape[1]) if bias_E is None else bias_E
        groups = (rule.num_groups, rule.top_groups, rule.top_k)
        weights_TK, ids_TK = ops.grouped_topk(logits_TE, *groups, rule.normalise, rule.routed_scale, bias_E, 1)
        return weights_TK, ids_TK
    weights_TK = torch.empty(logits_TE.shape[0], rule.top_k, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty_like(weights_TK, dtype=torch.int32)
    ops.topk_softmax(weights_TK, ids_TK, torch.empty_like(ids_TK), logits_TE, rule.normalise)
    return weights_TK, ids_TK


def gate_and_align(logits_TE: Tensor, rule: GateRule, block_m: int) -> None:
    """What vLLM runs between the router's logits and the first product."""
    _, ids_TK = gate(logits_TE, rule)
    _modules().align.moe_align_block_size(ids_TK, block_m, logits_TE.shape[1])


def default_config(num_tokens: int, weights: ExpertWeights, top_k: int) -> TileConfig:
    """The tile that vLLM picks by itself."""
    block = [128, 128] if weights.is_fp8 else None
    shapes = (weights.gate_up_EFD.size(), weights.down_EDF.size())
    kind = "fp8_w8a8" if weights.is_fp8 else None
    config: TileConfig = _modules().moe.try_get_optimal_moe_config(*shapes, top_k, kind, num_tokens, block_shape=block)
    return config


def layer(logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, rule: GateRule, config: TileConfig | None = None) -> Tensor:
    """vLLM's whole MoE layer, from the router's logits to [T, D]. Without a config, its own choice."""
    weights_TK, ids_TK = gate(logits_TE, rule)
    if weights.is_fp8:
        config = config or default_config(x_TD.shape[0], weights, rule.top_k)
        return _fp8_experts(x_TD, weights, weights_TK, ids_TK, config)
    found = _modules()
    fused = functools.partial(found.moe.fused_experts, x_TD, weights.gate_up_EFD, weights.down_EDF, weights_TK, ids_TK)
    if config is None:
        out: Tensor = fused()
        return out
    with found.moe_room.override_config(config):
        out = fused()
    return out


def _fp8_experts(x_TD: Tensor, weights: ExpertWeights, weights_TK: Tensor, ids_TK: Tensor, config: TileConfig) -> Tensor:
    """TritonExperts.apply with block-scaled fp8 weights, its launches in its order."""
    import triton.language as tl

    found = _modules()
    num_tokens, top_k = ids_TK.shape
    dim, width = weights.dim, 2 * weights.hidden
    block = [128, 128]
    assert weights.gate_up_scale_Efd is not None and weights.down_scale_Edf is not None, "fp8 weights carry scales"
    stored_TD, scale_Td = found.fp8.per_token_group_quant_fp8(x_TD, block[1])
    sorted_ids, expert_ids, num_padded = found.moe._prepare_expert_assignment(
        ids_TK, config, num_tokens, top_k, weights.num_experts, None, block_shape=block
    )
    both_TKF = x_TD.new_empty(num_tokens, top_k, width)
    rows_TKD = x_TD.new_empty(num_tokens, top_k, dim)

    def product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, per_row: int, weighted: bool) -> None:
        routed = weights_TK if weighted else None
        found.moe.invoke_fused_moe_triton_kernel(
            a, b, out, a_scale, b_scale, routed, sorted_ids, expert_ids, num_padded, weighted, per_row, config,
            compute_type=tl.bfloat16, use_fp8_w8a8=True, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
            per_channel_quant=False, block_shape=block,
        )  # fmt: skip

    product(stored_TD, scale_Td, weights.gate_up_EFD, weights.gate_up_scale_Efd, both_TKF, top_k, False)
    act, act_scale = found.ops.silu_and_mul_per_block_quant(both_TKF.view(-1, width), group_size=block[1], quant_dtype=stored_TD.dtype)
    product(act, act_scale, weights.down_EDF, weights.down_scale_Edf, rows_TKD, 1, True)
    out_TD = torch.empty_like(x_TD)
    found.ops.moe_sum(rows_TKD, out_TD)
    return out_TD


@functools.cache
def _tuned() -> dict[str, dict[str, TileConfig]]:
    return dict(json.loads(TUNED.read_text())["configs"]) if TUNED.is_file() else {}


def tuned_config(shape: str, is_fp8: bool, num_tokens: int) -> TileConfig | None:
    """vLLM's re-tuned tile for this shape, from the nearest batch size, as vLLM itself looks its files up."""
    table = _tuned().get(tuned_key(shape, is_fp8), {})
    return table[min(table, key=lambda size: abs(int(size) - num_tokens))] if table else None


def tuned_key(shape: str, is_fp8: bool) -> str:
    return f"{shape}/{'fp8' if is_fp8 else 'bf16'}"


def write_tuned(path: Path, head: dict[str, object], configs: dict[str, dict[str, TileConfig]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head | {"vllm": version(), "configs": configs}, indent=1) + "\n")


def tile_candidates(num_tokens: int, is_fp8: bool) -> list[TileConfig]:
    """What `duomo bench tune` tries for vLLM: the corner of its own tuner's space that suits the batch."""
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    if is_fp8:
        heights, widths, depths = ((16, 32) if num_tokens <= 128 else (16, 32, 64, 128)), (64, 128), (128,)
    elif num_tokens <= 64:
        heights, widths, depths = (16,), (32, 64, 128), (64, 128, 256)
    elif num_tokens <= 512:
        heights, widths, depths = (16, 32, 64), (64, 128), (64, 128)
    else:
        heights, widths, depths = (64, 128), (128, 256), (64,)
    found = []
    for m in heights:
        for n in widths:
            for k in depths:
                for stages in (3, 4):
                    warps = 8 if m * n >= 128 * 128 else 4
                    found.append({"BLOCK_SIZE_M": m, "BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k, "GROUP_SIZE_M": 1 if num_tokens <= 256 else 16,
                                  "num_warps": warps, "num_stages": stages})  # fmt: skip
    return found


def torch_layer(logits_TE: Tensor, x_TD: Tensor, weights: ExpertWeights, rule: GateRule) -> Tensor:
    """The second peer: a layer of torch's own operations around torch._grouped_mm (CUTLASS), softmax gates alone."""
    num_tokens, top_k = x_TD.shape[0], rule.top_k
    probs_TK, ids_TK = torch.softmax(logits_TE, -1).topk(top_k)
    if rule.normalise:
        probs_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
    flat_R, order_R = ids_TK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(flat_R, torch.arange(weights.num_experts, device=x_TD.device), right=True).int()
    both = torch._grouped_mm(x_TD[order_R // top_k], weights.gate_up_EFD.transpose(1, 2), offs=ends_E)
    gate_RF, up_RF = both.chunk(2, -1)
    rows_RD = torch._grouped_mm(torch.nn.functional.silu(gate_RF) * up_RF, weights.down_EDF.transpose(1, 2), offs=ends_E)
    unsorted_RD = torch.empty_like(rows_RD).index_copy_(0, order_R, rows_RD)
    out: Tensor = torch.einsum("tkd,tk->td", unsorted_RD.view(num_tokens, top_k, -1), probs_TK.to(x_TD.dtype))
    return out


def decode_attention(
    q_SHD: Tensor, pool: Tensor, table_SB: Tensor, lengths_S: Tensor, scale: float
) -> dict[str, Callable[[], Tensor]] | str:
    """FlashAttention 3 as vLLM's captured decode step calls it, and with the splits left to it; or why it cannot be called.

    The schedule is made once a step and shared by the layers, so it is made here, outside the call. The pool [blocks, 2, N, tokens, D]
    is copied into vLLM's pair of [blocks, block tokens, N, D].
    """
    found = _flash()
    if isinstance(found, str):
        return found
    keys, values = (pool[:, i].transpose(1, 2).contiguous() for i in (0, 1))
    num_sequences, num_heads, head_dim = q_SHD.shape
    starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=q_SHD.device)
    longest = int(lengths_S.max())
    out = torch.empty_like(q_SHD)
    calls: dict[str, Callable[[], Any]] = {}
    for name, splits in (("flash_attention_3", MAX_SPLITS), ("flash_attention_3_free", 0)):
        schedule = found.get_scheduler_metadata(
            batch_size=num_sequences, max_seqlen_q=1, max_seqlen_k=longest, num_heads_q=num_heads, num_heads_kv=pool.shape[2],
            headdim=head_dim, cache_seqlens=lengths_S, qkv_dtype=q_SHD.dtype, cu_seqlens_q=starts, page_size=pool.shape[3], causal=True,
            num_splits=splits,
        )  # fmt: skip
        calls[name] = functools.partial(
            found.flash_attn_varlen_func, q=q_SHD, k=keys, v=values, out=out, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=longest,
            seqused_k=lengths_S, softmax_scale=scale, causal=True, block_table=table_SB, scheduler_metadata=schedule, num_splits=splits,
            fa_version=3,
        )  # fmt: skip
    return calls


@functools.cache
def _flash() -> ModuleType | str:
    if (reason := why_absent()) is not None:
        return reason
    try:
        found = importlib.import_module("vllm.vllm_flash_attn")
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    why: str | None = found.fa_version_unsupported_reason(3)
    return why or found
