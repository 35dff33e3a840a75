"""Sampling against torch's operations in the order of vLLM's own sampler (a sort of the vocabulary where a row has limits).

Floor: the logits once. Logits are peaked as a trained model's (a power of the rank, with noise) or flat (normal), where a top-p keeps most
of the vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, gpu_bench, interleaved_us, num_sets
from bench.stopwatch import refuse_unless
from duomo_kernels._sampling import SampleRows
from duomo_kernels.sample import EDGE, Mode, misplaced, sample

VOCAB = 151_936
KINDS: dict[str, tuple[Mode, dict[str, float]]] = {
    "greedy": ("greedy", {"temperature": 0.0}),
    "plain": ("plain", {}),
    "top-k 50": ("limited", {"top_k": 50}),
    "top-p 0.95": ("limited", {"top_p": 0.95}),
    "top-k 50, top-p 0.95": ("limited", {"top_k": 50, "top_p": 0.95}),
    "flat, top-p 0.95": ("limited", {"top_p": 0.95}),
}
CASES = [(rows, VOCAB, kind) for rows in (1, 64) for kind in KINDS] + [(64, 50_304, kind) for kind in ("greedy", "top-p 0.95")]


def peer(logits_SV: Tensor, rows: SampleRows, mode: Mode) -> Tensor:
    """The next token of every row; the maximum of share / exponential noise draws by share."""
    if mode == "greedy":
        return logits_SV.argmax(-1)
    x_SV = logits_SV / rows.temperature_S[:, None]
    if mode == "limited":
        x_SV = _within_limits(x_SV, rows)
    share_SV = x_SV.softmax(-1, dtype=torch.float32)
    return share_SV.div_(torch.empty_like(share_SV).exponential_()).argmax(-1)


def _within_limits(x_SV: Tensor, rows: SampleRows) -> Tensor:
    sorted_SV, ids_SV = x_SV.sort(dim=-1, descending=False)
    vocab = x_SV.shape[1]
    at_S = torch.where(rows.top_k_S > 0, vocab - rows.top_k_S, 0).long()
    sorted_SV.masked_fill_(sorted_SV < sorted_SV.gather(1, at_S[:, None]), -torch.inf)
    below_SV = sorted_SV.softmax(-1).cumsum_(-1)
    is_out_SV = below_SV <= 1 - rows.top_p_S[:, None]
    is_out_SV[:, -1] = False
    return torch.empty_like(x_SV).scatter_(1, ids_SV, sorted_SV.masked_fill_(is_out_SV, -torch.inf))


def measure(options: Options) -> list[Row]:
    rows = []
    for num_rows, vocab, kind in CASES:
        case = f"{num_rows} x {vocab} {kind}"
        if options.only not in case:
            continue
        mode, asked = KINDS[kind]
        num_bytes = 4 * num_rows * vocab
        sets = [(_logits(num_rows, vocab, kind.startswith("flat")), _rows(num_rows, asked)) for _ in range(num_sets(num_bytes, at_most=32))]
        few = _logits(8, vocab, kind.startswith("flat")), _rows(8, asked)
        off = misplaced(sample(*few, mode=mode)[0], *few)
        refuse_unless(off <= EDGE, f"sample {case} ({off:.3g} of the distribution beside its token)")
        calls: dict[str, list[Call]] = {
            "ours": [partial(sample, *one, mode=mode) for one in sets],
            "torch": [partial(peer, *one, mode) for one in sets],
        }
        rows.append(Row(case=case, times=interleaved_us(calls, repeats=options.repeats), num_bytes=num_bytes, error=off))
        del sets, calls
    return rows


def _logits(num_rows: int, vocab: int, is_flat: bool) -> Tensor:
    noise_SV = torch.randn(num_rows, vocab, device="cuda")
    if is_flat:
        return noise_SV
    rank_SV = torch.rand(num_rows, vocab, device="cuda").argsort(-1)
    return noise_SV - 1.5 * torch.log(1.0 + rank_SV)


def _rows(num_rows: int, asked: dict[str, float]) -> SampleRows:
    of = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | asked

    def column(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device="cuda")

    return SampleRows(
        temperature_S=column(of["temperature"], torch.float32),
        top_k_S=column(of["top_k"], torch.int32),
        top_p_S=column(of["top_p"], torch.float32),
        min_p_S=column(of["min_p"], torch.float32),
        seed_S=torch.randint(0, 1 << 62, (num_rows,), device="cuda"),
        choice_S=column(0, torch.int32),
        position_S=torch.arange(num_rows, dtype=torch.int32, device="cuda"),
        num_valid=torch.full((1,), num_rows, dtype=torch.int32, device="cuda"),
    )


if __name__ == "__main__":
    gpu_bench("sample", measure)
