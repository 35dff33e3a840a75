"""The weighted sum of the experts' rows, against torch's gather and batched product. Floor: every routed row once, the output once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_stopwatch import Call, Options, Row, checked, gpu_bench, interleaved_us, num_sets
from duomo_kernels.expert_combine import expert_combine, expert_combine_reference

BF16 = torch.bfloat16
TOKENS = (1, 8, 64, 256, 1024, 4096, 16_384)
MODELS = [("OLMoE and Qwen3-30B", 8, 2048), ("Mixtral", 2, 4096)]  # name, K, D


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """One call's tensors; places are a random order, as a sort by expert makes them."""

    rows_RD: Tensor
    place_R: Tensor
    weights_TK: Tensor
    out_TD: Tensor

    def ours(self) -> Tensor:
        return expert_combine(self.rows_RD, self.place_R, self.weights_TK, out_TD=self.out_TD)

    def peer(self) -> Tensor:
        by_token_TKD = self.rows_RD[self.place_R].view(*self.weights_TK.shape, -1)
        return torch.bmm(self.weights_TK.to(BF16).unsqueeze(1), by_token_TKD).squeeze(1)


def measure(options: Options) -> list[Row]:
    rows = []
    for name, top_k, width in MODELS:
        for tokens in TOKENS:
            case = f"{name} {tokens} tokens"
            if options.only not in case:
                continue
            num_bytes = 2 * tokens * width * (top_k + 1) + 8 * tokens * top_k
            sets = [_inputs(tokens, top_k, width) for _ in range(num_sets(num_bytes))]
            few = min(tokens, 256)  # the reference walks places in Python: the first tokens, with every row within reach
            one = sets[0]
            expected_TD = _reference(one, few)
            error = checked("expert_combine", one.ours()[:few], expected_TD)
            calls: dict[str, list[Call]] = {
                "ours": [partial(Inputs.ours, s) for s in sets],
                "torch": [partial(Inputs.peer, s) for s in sets],
            }
            rows.append(Row(case=case, times=interleaved_us(calls, repeats=options.repeats), num_bytes=num_bytes, error=error))
    return rows


def _reference(given: Inputs, few: int) -> Tensor:
    """The first tokens' sums from their own rows alone, in the order of their places."""
    top_k = given.weights_TK.shape[1]
    rows_RD = given.rows_RD[given.place_R[: few * top_k]]
    return expert_combine_reference(rows_RD, torch.arange(few * top_k, device=rows_RD.device), given.weights_TK[:few])


def _inputs(tokens: int, top_k: int, width: int) -> Inputs:
    return Inputs(
        rows_RD=torch.randn(tokens * top_k, width, device="cuda", dtype=BF16),
        place_R=torch.randperm(tokens * top_k, device="cuda").int(),
        weights_TK=torch.rand(tokens, top_k, device="cuda"),
        out_TD=torch.empty(tokens, width, device="cuda", dtype=BF16),
    )


if __name__ == "__main__":
    gpu_bench("expert_combine", measure)
