"""Our own engine in one loop: the tokens that the split system must equal. Knows duomo.engine; no service."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from duomo.engine.monolith import GenerateRequest, MonolithLimits, generate
from duomo.models.qwen3_moe import load_model
from duomo.wire.values import Sampling


def monolithic_tokens(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt, `num_tokens` each, EOS ignored."""
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    requests = [GenerateRequest(prompt_ids=tuple(prompt), sampling=sampling) for prompt in prompts]
    with torch.inference_mode():
        outputs = generate(load_model(folder, progress=False), requests, MonolithLimits(max_batch=16))
    return [[token.token_id for token in output] for output in outputs]
