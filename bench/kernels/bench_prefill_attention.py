"""Prefill attention: our kernel and every library that takes packed lengths or can be made to, on the same inputs, each checked first.

A candidate that is absent, refuses the shape, cannot be captured or is wrong is a line of the result ("unavailable: why"), not its end.
Rates count the keys that causal rows see and no others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu_stopwatch import Call, Options, Row, cold_graph_us, gpu_bench, interleaved_us, num_sets
from duomo_kernels._bounds import bound, error
from duomo_kernels.prefill_attention import CachedPrefix, PrefillConfig, prefill_attention, prefill_attention_reference

CHECKED_ROWS = 32  # last rows of each checked sequence: they see every key
CONFIGS = {
    "ours 128x64": PrefillConfig(block_rows=128, block_keys=64, num_stages=3, num_warps=8),
    "ours 64x64": PrefillConfig(block_rows=64, block_keys=64, num_stages=2, num_warps=4),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """New tokens of each sequence after `cached` tokens each, which lie in the pool."""

    name: str
    num_heads: int
    num_kv_heads: int
    lengths: list[int]
    cached: int = 0
    head_dim: int = 128

    @property
    def num_flop(self) -> float:
        seen = sum(n * self.cached + n * (n + 1) / 2 for n in self.lengths)
        return 4.0 * self.num_heads * self.head_dim * seen

    @property
    def num_bytes(self) -> int:
        per_token = 2 * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return sum(self.lengths) * per_token + len(self.lengths) * self.cached * 4 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One set of packed tensors and, with cached tokens, the same keys as pages and as one packed row per position for peers."""

    case: Case
    q_THD: Tensor
    k_TND: Tensor
    v_TND: Tensor
    cu_seqlens_S1: Tensor
    out_THD: Tensor
    prefix: CachedPrefix | None
    pages: tuple[Tensor, Tensor, Tensor] | None  # what vLLM would read: keys, values and table of cached and new tokens

    @property
    def longest(self) -> int:
        return max(self.case.lengths)

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)


Candidate = Callable[[Inputs], Tensor]


def cases() -> list[Case]:
    shapes = {"16 x 1024": [1024] * 16, "8 x 2048": [2048] * 8, "1 x 8192": [8192], "1 x 16384": [16_384]}
    shapes["32 of 50 to 2k"] = [50 + 63 * (i * 13 % 32) for i in range(32)]
    found = []
    for num_heads, num_kv_heads in ((32, 4), (16, 16)):
        heads = f"{num_heads}/{num_kv_heads}"
        for what, lengths in shapes.items():
            found.append(Case(name=f"{heads}: {what}", num_heads=num_heads, num_kv_heads=num_kv_heads, lengths=lengths))
        name = f"{heads}: 8 x (4k cached + 512)"
        found.append(Case(name=name, num_heads=num_heads, num_kv_heads=num_kv_heads, lengths=[512] * 8, cached=4096))
    return found


def make_inputs(case: Case, block_tokens: int = 128) -> Inputs:
    num_tokens, heads = sum(case.lengths), (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    packed = [torch.randn(num_tokens, n, case.head_dim, device="cuda", dtype=torch.bfloat16) for n in heads]
    bounds = torch.tensor([0, *case.lengths]).cumsum(0).to(torch.int32).cuda()
    prefix, pages = None, None
    if case.cached:
        width, num_sequences = case.cached // block_tokens, len(case.lengths)
        pool = torch.randn(num_sequences * width, 2, case.num_kv_heads, block_tokens, case.head_dim, device="cuda", dtype=torch.bfloat16)
        table_SB = torch.randperm(num_sequences * width).to(torch.int32).view(num_sequences, width).cuda()
        lengths_S = torch.full((num_sequences,), case.cached, dtype=torch.int32, device="cuda")
        prefix = CachedPrefix(pool=pool, block_table_SB=table_SB, lengths_S=lengths_S)
        pages = _pages(case, packed[1], packed[2], prefix)
    tensors = dict(zip(("q_THD", "k_TND", "v_TND", "out_THD"), packed, strict=True))
    return Inputs(case=case, cu_seqlens_S1=bounds, prefix=prefix, pages=pages, **tensors)


def _cached(prefix: CachedPrefix, s: int) -> Tensor:
    """Keys and values of one sequence's prefix: [2, cached, N, D]."""
    return prefix.pool[prefix.block_table_SB[s].long()].permute(1, 0, 3, 2, 4).flatten(1, 2)


def _pages(case: Case, k_TND: Tensor, v_TND: Tensor, prefix: CachedPrefix) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of 16 tokens, vLLM's default, that hold the prefix and then the new tokens of each sequence (lengths are equal)."""
    num_sequences, length = len(case.lengths), case.lengths[0]
    new = torch.stack([k_TND, v_TND]).view(2, num_sequences, length, case.num_kv_heads, case.head_dim)
    whole = torch.stack([torch.cat([_cached(prefix, s), new[:, s]], 1) for s in range(num_sequences)], 1)
    k, v = whole.view(2, -1, 16, case.num_kv_heads, case.head_dim)
    table_SB = torch.arange(k.shape[0], dtype=torch.int32, device="cuda").view(num_sequences, -1)
    return k, v, table_SB


def ours(one: Inputs, config: PrefillConfig | None = None) -> Tensor:
    packed = (one.q_THD, one.k_TND, one.v_TND, one.cu_seqlens_S1)
    return prefill_attention(*packed, scale=one.scale, prefix=one.prefix, way="ours", config=config, out=one.out_THD)


def cudnn_ragged(one: Inputs) -> Tensor:
    """The operator beneath torch's nested tensors: packed lengths on the device."""
    packed = (one.q_THD, one.k_TND, one.v_TND, one.cu_seqlens_S1)
    return prefill_attention(*packed, scale=one.scale, prefix=one.prefix, way="cudnn", max_tokens=one.longest)


def _sdpa(one: Inputs, backend: SDPBackend) -> Tensor:
    """Sequence by sequence; one call for all where lengths are equal."""
    _needs_no_prefix(one)
    lengths = one.case.lengths
    groups = [(0, len(lengths), lengths[0])] if len(set(lengths)) == 1 else [(i, 1, n) for i, n in enumerate(lengths)]
    begin = 0
    with sdpa_kernel(backend):
        for _, num, length in groups:
            rows = slice(begin, begin + num * length)
            q, k, v = (x[rows].view(num, length, -1, one.case.head_dim).transpose(1, 2) for x in (one.q_THD, one.k_TND, one.v_TND))
            is_grouped = one.case.num_heads != one.case.num_kv_heads
            got = scaled_dot_product_attention(q, k, v, is_causal=True, scale=one.scale, enable_gqa=is_grouped)
            one.out_THD[rows].view(num, length, -1, one.case.head_dim).copy_(got.transpose(1, 2))
            begin = rows.stop
    return one.out_THD


def nested(one: Inputs) -> Tensor:
    """torch's jagged nested tensors, cuDNN asked for."""
    _needs_no_prefix(one)
    offsets = one.cu_seqlens_S1.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=min(one.case.lengths), max_seqlen=one.longest).transpose(1, 2)
        for x in (one.q_THD, one.k_TND, one.v_TND)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        is_grouped = one.case.num_heads != one.case.num_kv_heads
        got = scaled_dot_product_attention(q, k, v, is_causal=True, scale=one.scale, enable_gqa=is_grouped)
    values: Tensor = got.transpose(1, 2).values()
    return values


def varlen(one: Inputs) -> Tensor:
    """torch's flash attention over packed lengths."""
    _needs_no_prefix(one)
    got: Tensor = torch.ops.aten._flash_attention_forward(
        *(one.q_THD, one.k_TND, one.v_TND, one.cu_seqlens_S1, one.cu_seqlens_S1, one.longest, one.longest),
        *(0.0, True, False),
        scale=one.scale,
    )[0]
    return got


def fa3(one: Inputs) -> Tensor:
    """vLLM's FlashAttention 3; with cached tokens it reads pages, into which vLLM would have written the new keys too."""
    module = importlib.import_module("vllm.vllm_flash_attn")
    keys: dict[str, Tensor | int | None] = {"k": one.k_TND, "v": one.v_TND, "cu_seqlens_k": one.cu_seqlens_S1, "max_seqlen_k": one.longest}
    if one.pages is not None:
        total = one.case.cached + one.case.lengths[0]
        used = torch.full((len(one.case.lengths),), total, dtype=torch.int32, device="cuda")
        keys = {"k": one.pages[0], "v": one.pages[1], "block_table": one.pages[2], "seqused_k": used, "max_seqlen_k": total}
    got: Tensor = module.flash_attn_varlen_func(
        q=one.q_THD,
        max_seqlen_q=one.longest,
        cu_seqlens_q=one.cu_seqlens_S1,
        softmax_scale=one.scale,
        causal=True,
        out=one.out_THD,
        fa_version=3,
        **keys,
    )
    return got


def _needs_no_prefix(one: Inputs) -> None:
    if one.prefix is not None:
        raise RuntimeError("takes no paged prefix")


def candidates() -> dict[str, Candidate]:
    found: dict[str, Candidate] = {name: partial(ours, config=config) for name, config in CONFIGS.items()}
    found |= {"cudnn, ragged": cudnn_ragged, "cudnn, sdpa": partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION)}
    found |= {"flash, sdpa": partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION), "nested": nested, "flash, varlen": varlen, "fa3": fa3}
    return found


def spot_error(one: Inputs, out_THD: Tensor) -> float:
    """The last rows of the longest sequence and of the last: a prefix of all else, they see every key."""
    worst = 0.0
    bounds = one.cu_seqlens_S1.tolist()
    for s in {one.case.lengths.index(one.longest), len(one.case.lengths) - 1}:
        first, rows = bounds[s], one.case.lengths[s]
        tail = min(CHECKED_ROWS, rows)
        kv = [x[first : first + rows].double() for x in (one.k_TND, one.v_TND)]
        if one.prefix is not None:
            kv = [torch.cat([c.double(), x]) for c, x in zip(_cached(one.prefix, s), kv, strict=True)]
        q = one.q_THD[first + rows - tail : first + rows]
        worst = max(worst, error(out_THD[first + rows - tail : first + rows], _tail_reference(q, kv[0], kv[1], one.scale)))
    return worst


def _tail_reference(q_THD: Tensor, k_LND: Tensor, v_LND: Tensor, scale: float) -> Tensor:
    """The last T of L rows in float64: the keys before them are their prefix, in one block."""
    cached, rows = k_LND.shape[0] - q_THD.shape[0], q_THD.shape[0]
    pool = torch.stack([k_LND[:cached].transpose(0, 1), v_LND[:cached].transpose(0, 1)])[None]
    device = q_THD.device
    prefix = CachedPrefix(
        pool=pool,
        block_table_SB=torch.zeros(1, 1, dtype=torch.int32, device=device),
        lengths_S=torch.tensor([cached], dtype=torch.int32, device=device),
    )
    cu_seqlens = torch.tensor([0, rows], dtype=torch.int32, device=device)
    return prefill_attention_reference(q_THD, k_LND[cached:], v_LND[cached:], cu_seqlens, scale, prefix if cached else None)


def working(case: Case, sets: list[Inputs]) -> tuple[dict[str, list[Call]], dict[str, float | str]]:
    """Candidates that run, are right and can be captured; of the others the reason. Ours must be right: no excuse."""
    checked_error = spot_error(sets[0], ours(sets[0]))
    if checked_error > bound(torch.bfloat16):
        raise SystemExit(f"{case.name}: ours is wrong (error {checked_error:.3g}); nothing is reported")
    calls: dict[str, list[Call]] = {"ours": [partial(ours, one) for one in sets]}
    about: dict[str, float | str] = {"error": checked_error}
    for name, candidate in candidates().items():
        try:
            wrong = spot_error(sets[0], candidate(sets[0]))
            if wrong > bound(torch.bfloat16):
                raise RuntimeError(f"error {wrong:.3g}")
            tried: list[Call] = [partial(candidate, one) for one in sets]
            cold_graph_us(tried[:1], repeats=1)
        except Exception as reason:  # a peer that is not here is a line of the result, not the end of it
            about[name] = f"unavailable: {reason!r}"[:200]
            torch.cuda.synchronize()
            continue
        calls[name] = tried
    return calls, about


def measure(options: Options) -> list[Row]:
    rows = []
    for case in cases():
        if options.only not in case.name:
            continue
        sets = [make_inputs(case) for _ in range(num_sets(case.num_bytes, at_most=8))]
        calls, about = working(case, sets)
        times = interleaved_us(calls, repeats=options.repeats)
        about |= {f"{name}, TFLOP/s": round(case.num_flop / t.median_us / 1e6, 1) for name, t in times.items()}
        wrong = float(about.pop("error"))
        rows.append(Row(case=case.name, times=times, num_bytes=case.num_bytes, num_flop=case.num_flop, error=wrong, about=about))
        print(rows[-1].line(), flush=True)
        print(*(f"    {name}: {why}" for name, why in about.items() if isinstance(why, str)), sep="\n", flush=True)
    return rows


if __name__ == "__main__":
    gpu_bench("prefill_attention", measure)
