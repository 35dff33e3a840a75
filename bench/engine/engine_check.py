"""Owns the rule by which greedy tokens of one computation are held against the logits of another. Knows no engine.

Two right computations of a row round differently: after L layers their logits differ by noise of about bound(bf16) sqrt(L) of the row's
size (roundings are independent, so they add in squares). Where two experts were a near tie, as in random models many are, the two choose
differently and the row moves by a tenth. So a token may differ from the other's first choice where the two choices were close: its gap,

    (largest logit - the token's logit) / root mean square of the row

lies within `slack` for most tokens, and far for none. A wrong model's token is one of V normal numbers: four below the largest. What single
kernels and layers may be wrong by is held to a much smaller bound by their own tests; this one is about whole steps, graphs and pools.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.engine.engine_cases import Dtype, FirstTokens
from duomo_kernels._bounds import bound

MOST = 0.75  # of the tokens lie within the slack
FARTHEST = 2.0
TIMES_NOISE = 4.0  # a gap is the difference of two logits in two computations, two standard deviations of a logit; twice that
FP8_NOISE = (
    4.0  # rounding activations to e4m3 before each product: 2^-4 instead of 2^-8, in two of a layer's four roundings, rarely another way
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Of X tokens: gaps in root mean squares of their rows, and whether the first choice was clear."""

    slack: float
    gaps: tuple[float, ...]
    is_clear: tuple[bool, ...]
    is_finite: bool

    @property
    def share(self) -> float:
        return float(sum(gap <= self.slack for gap in self.gaps) / len(self.gaps))

    def line(self) -> str:
        same = sum(gap == 0 for gap in self.gaps)
        return f"{same} of {len(self.gaps)} tokens the same, {self.share:.1%} within {self.slack:.3f}, farthest {max(self.gaps):.3f}"

    def why_red(self) -> str:
        """ "" where it is right."""
        if not self.is_finite:
            return "logits are not finite"
        if self.share < MOST or max(self.gaps) > FARTHEST:
            return f"tokens of captured steps are not those of one prefill: {self.line()}"
        return ""


def slack_of(num_layers: int, dtype: Dtype) -> float:
    """The gap that rounding explains."""
    return TIMES_NOISE * bound(torch.bfloat16) * math.sqrt(num_layers) * (FP8_NOISE if dtype == "fp8" else 1.0)


def judge(logits_XV: Tensor, token_X: Tensor, slack: float) -> Judgement:
    """Tokens (int64) of one computation under the logits (float32) of another."""
    size_X = logits_XV.double().square().mean(-1).sqrt()
    top_X2 = logits_XV.topk(2).values.double()
    chosen_X = logits_XV.gather(1, token_X[:, None])[:, 0].double()
    gaps = ((top_X2[:, 0] - chosen_X) / size_X).tolist()
    clear = ((top_X2[:, 0] - top_X2[:, 1]) / size_X > slack).tolist()
    is_finite = bool(torch.isfinite(logits_XV).all())
    return Judgement(slack=slack, gaps=tuple(gaps), is_clear=tuple(clear), is_finite=is_finite)


def agreement(ours: FirstTokens, theirs: FirstTokens) -> tuple[int, int, int, int]:
    """(equal, all, equal where ours was clear, clear ones)."""
    equal = [a == b for a, b in zip(ours.token_ids, theirs.token_ids, strict=True)]
    clear = [one for one, is_clear in zip(equal, ours.is_clear, strict=True) if is_clear]
    return sum(equal), len(equal), sum(clear), len(clear)
