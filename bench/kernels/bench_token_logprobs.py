"""Log-probabilities of the chosen and the likeliest tokens, against log_softmax, gather and topk. Floor: the logits once."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, checked, gpu_bench, interleaved_us, num_sets
from duomo_kernels.token_logprobs import token_logprobs, token_logprobs_reference

VOCAB = 151_936
CASES = [(1, 0), (64, 0), (1, 20), (64, 5), (64, 20)]


def peer(logits_SV: Tensor, token_S: Tensor, max_top: int) -> tuple[Tensor, ...]:
    logprob_SV = logits_SV.log_softmax(-1)
    chosen_S = logprob_SV.gather(1, token_S[:, None])
    return (chosen_S, *torch.topk(logprob_SV, max_top)) if max_top else (chosen_S,)


def measure(options: Options) -> list[Row]:
    rows = []
    for num_rows, max_top in CASES:
        case = f"{num_rows} x {VOCAB}, top {max_top}"
        if options.only not in case:
            continue
        num_bytes = 4 * num_rows * VOCAB
        logits = [torch.randn(num_rows, VOCAB, device="cuda") * 3 for _ in range(num_sets(num_bytes, at_most=32))]
        token_S = torch.randint(0, VOCAB, (num_rows,), device="cuda")
        num_top_S = torch.full((num_rows,), max_top, dtype=torch.int32, device="cuda")
        few = token_S.int(), num_top_S, torch.full((1,), num_rows, dtype=torch.int32, device="cuda"), max_top
        got, ref = token_logprobs(logits[0], *few), token_logprobs_reference(logits[0], token_S, max_top)
        error = max(checked("token_logprobs", got[0], ref[0]), checked("token_logprobs", got[2], ref[2]))
        del ref
        calls: dict[str, list[Call]] = {
            "ours": [partial(token_logprobs, one, *few) for one in logits],
            "torch": [partial(peer, one, token_S, max_top) for one in logits],
        }
        rows.append(Row(case=case, times=interleaved_us(calls, repeats=options.repeats), num_bytes=num_bytes, error=error))
    return rows


if __name__ == "__main__":
    gpu_bench("token_logprobs", measure)
