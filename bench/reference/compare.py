"""The rule for greedy tokens against the float32 reference. Knows torch and a transformers model; no service.

A differing token passes only where the reference's two best logits lie within LOGIT_GAP, or where, at some position that the token
attends to, the router's k-th and (k+1)-th scores lie within ROUTER_GAP; at most one token in ALLOWED_PER_TOKENS, and each is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

LOGIT_GAP = 1e-4
ROUTER_GAP = 1e-5
ALLOWED_PER_TOKENS = 10_000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a token differs from the reference, given the same tokens before it, and how close the call was."""

    name: str
    index: int
    token_id: int
    reference_id: int
    logit_gap: float
    router_gap: float

    @property
    def is_excused(self) -> bool:
        return self.logit_gap < LOGIT_GAP or self.router_gap < ROUTER_GAP


def differences(model: Any, name: str, prompt_ids: Sequence[int], tokens: Sequence[int]) -> list[Difference]:
    """Compare greedy `tokens` with the reference token for token, each given the tokens that were really emitted before it.

    If none differs, the reference's own greedy run is the same, by induction. One float32 forward over prompt and tokens.
    """
    ids = torch.tensor([[*prompt_ids, *tokens]])
    with torch.inference_mode():
        out = model(ids, output_router_logits=True, use_cache=False)
    rows = out.logits[0, len(prompt_ids) - 1 : -1].float()
    best = rows.topk(2, dim=-1)
    found = []
    for index, token_id in enumerate(tokens):
        reference_id = int(best.indices[index, 0])
        if token_id == reference_id:
            continue
        gap = float(rows[index, reference_id] - rows[index, token_id])
        last = len(prompt_ids) + index
        router_gap = min(_router_gap(layer[:last].float(), model.config.num_experts_per_tok) for layer in out.router_logits)
        found.append(Difference(name=name, index=index, token_id=token_id, reference_id=reference_id, logit_gap=gap, router_gap=router_gap))
    return found


def _router_gap(logits_TE: torch.Tensor, top_k: int) -> float:
    probabilities_TE = logits_TE.softmax(-1).sort(-1, descending=True).values
    return float((probabilities_TE[:, top_k - 1] - probabilities_TE[:, top_k]).min())


def verdict(found: Sequence[Difference], num_tokens: int) -> str:
    """Empty when the rule holds; else what breaks it."""
    unexcused = [one for one in found if not one.is_excused]
    if unexcused:
        return f"{len(unexcused)} of {num_tokens} tokens differ from the reference without excuse: {unexcused[:5]}"
    if len(found) * ALLOWED_PER_TOKENS > max(num_tokens, ALLOWED_PER_TOKENS):
        return f"{len(found)} near-tied tokens of {num_tokens} differ, more than 1 in {ALLOWED_PER_TOKENS}: {found}"
    return ""
