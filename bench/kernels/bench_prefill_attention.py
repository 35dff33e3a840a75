"""Prefill attention: what the launcher chooses ("ours"), our kernel, and peers, on the same inputs, each checked first.

A candidate that is absent, refuses the shape, cannot be captured or is wrong is a line of the result ("unavailable: why"), not its end.
Rates count the keys that causal rows see and no others. Peers: "cudnn" and "flash" are torch's (sequence by sequence, and packed lengths),
"fa3" is vLLM's FlashAttention 3; "n32" and "n64" are the kernel with tiles of so many keys. Not here: cuDNN's ragged offsets, which fail
under capture, and torch's nested tensors, which it refuses.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, cold_graph_us, gpu_bench, interleaved_us, num_sets
from duomo_kernels._bounds import bound, error
from duomo_kernels.prefill_attention import (
    CachedPrefix,
    PrefillConfig,
    default_config,
    prefill_attention,
    prefill_attention_reference,
)

CHECKED_ROWS = 32  # last rows of each checked sequence: they see every key
ONE_WARPGROUP = PrefillConfig(block_rows=128, block_keys=32, num_stages=3, num_warps=4)  # two programs share a multiprocessor


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
    mixed = [50 + 63 * (i * 13 % 32) for i in range(32)]
    shapes = {"16 x 1024": [1024] * 16, "8 x 2048": [2048] * 8, "1 x 8192": [8192], "1 x 16384": [16_384], "32 of 50 to 2k": mixed}
    found = [Case(name=f"32/4: {what}", num_heads=32, num_kv_heads=4, lengths=lengths) for what, lengths in shapes.items()]
    found.append(Case(name="32/4: 8 x (4k cached + 512)", num_heads=32, num_kv_heads=4, lengths=[512] * 8, cached=4096))
    for what in ("8 x 2048", "32 of 50 to 2k"):
        found.append(Case(name=f"16/16: {what}", num_heads=16, num_kv_heads=16, lengths=shapes[what]))
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


def ours(one: Inputs) -> Tensor:
    """What the launcher chooses by itself, told of equal lengths where they are."""
    is_equal = one.prefix is None and len(set(one.case.lengths)) == 1
    packed = (one.q_THD, one.k_TND, one.v_TND, one.cu_seqlens_S1)
    return prefill_attention(*packed, scale=one.scale, prefix=one.prefix, tokens_each=one.longest if is_equal else None)


def kernel(one: Inputs, config: PrefillConfig | None = None) -> Tensor:
    packed = (one.q_THD, one.k_TND, one.v_TND, one.cu_seqlens_S1)
    return prefill_attention(*packed, scale=one.scale, prefix=one.prefix, way="ours", config=config, out=one.out_THD)


def cudnn(one: Inputs) -> Tensor:
    """Sequence by sequence: it takes no packed lengths that can be captured."""
    bounds = one.cu_seqlens_S1[:2]  # not read
    begin = 0
    for length in one.case.lengths:
        q, k, v, out = (x[begin : begin + length] for x in (one.q_THD, one.k_TND, one.v_TND, one.out_THD))
        prefill_attention(q, k, v, bounds, scale=one.scale, way="cudnn", tokens_each=length, out=out)
        begin += length
    return one.out_THD


def flash(one: Inputs) -> Tensor:
    """torch's flash attention over packed lengths."""
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


def candidates(case: Case) -> dict[str, Candidate]:
    """Beside what was chosen: only what differs from it and takes such a case."""
    if case.cached:
        return {"n64": partial(kernel, config=default_config(case.head_dim, has_prefix=False)), "fa3": fa3}
    peers: dict[str, Candidate] = {"kernel": kernel} if len(set(case.lengths)) == 1 else {}
    if case.num_kv_heads != case.num_heads:  # once is enough: tiles cost a compilation, cuDNN a plan for each length
        peers |= {"n32": partial(kernel, config=ONE_WARPGROUP)} | ({} if peers else {"cudnn": cudnn})
    return peers | {"flash": flash, "fa3": fa3}


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
    for name, candidate in candidates(case).items():
        try:
            wrong = spot_error(sets[0], candidate(sets[0]))
            if wrong > bound(torch.bfloat16):
                raise RuntimeError(f"error {wrong:.3g}")
            tried: list[Call] = [partial(candidate, one) for one in sets]
            cold_graph_us(tried[:1], repeats=1)
        except Exception as reason:  # a peer that is not here is a line of the result, not the end of it
            about[name] = " ".join(f"unavailable: {reason}".split())[:100]
            torch.cuda.synchronize()
            continue
        calls[name] = tried
    return calls, about


def measure(options: Options) -> list[Row]:
    rows, reasons = [], set[str]()
    for case in cases():
        if options.only not in case.name:
            continue
        sets = [make_inputs(case) for _ in range(num_sets(case.num_bytes, at_most=8))]
        calls, about = working(case, sets)
        times = interleaved_us(calls, repeats=options.repeats)
        about |= {f"{name}, TFLOP/s": round(case.num_flop / t.median_us / 1e6, 1) for name, t in times.items()}
        wrong = float(about.pop("error"))
        rows.append(Row(case=case.name, times=times, num_bytes=case.num_bytes, num_flop=case.num_flop, error=wrong, about=about))
        reasons |= {f"{name} {why}" for name, why in about.items() if isinstance(why, str)}
    print(*sorted(reasons), sep="\n", flush=True)
    return rows


if __name__ == "__main__":
    gpu_bench("prefill_attention", measure)
