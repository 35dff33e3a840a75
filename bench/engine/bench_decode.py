"""One decode step by batch size, and a long prefill, against transformers' generate of the same tokens in the same run.

    PYTHONPATH=.:kernels python bench/engine/bench_decode.py --out bench/results/engine_cpu.json

Each case is one whole generation; a case's microseconds are those of one step of it. Ours and the peer run in turn, with the same torch
threads. It refuses to report where our greedy tokens differ from generate's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench.reference.tiny_moe import build_reference
from bench.stopwatch import Measured, refuse_unless, report, side_by_side
from duomo.engine.monolith import GenerateRequest, generate
from duomo.models.qwen3_moe import Model, load_model
from duomo.wire.values import Sampling

TINY_MOE = Path(__file__).resolve().parents[2] / "models" / "tiny-moe"


def case(model: Model, reference: Any, batch: int, prompt_tokens: int, new_tokens: int, repeats: int) -> Measured:
    """`batch` prompts at once; reported for each of new_tokens steps (the prefill is in it, as in the peer)."""
    prompts = torch.randint(3, 8192, (batch, prompt_tokens), generator=torch.Generator().manual_seed(batch))
    sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    requests = [GenerateRequest(prompt_ids=row, sampling=sampling) for row in prompts.tolist()]

    def ours() -> list[list[int]]:
        return [[token.token_id for token in tokens] for tokens in generate(model, requests)]

    def theirs() -> list[list[int]]:
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
        out = reference.generate(prompts, attention_mask=torch.ones_like(prompts), eos_token_id=None, **length)
        return [row[prompt_tokens:] for row in out.tolist()]

    refuse_unless(ours() == theirs(), f"greedy decoding at batch {batch}")
    whole = side_by_side(f"batch {batch}, {prompt_tokens} + {new_tokens} tokens", ours, "generate", theirs, repeats=repeats)
    return Measured(
        case=whole.case,
        best_us=round(whole.best_us / new_tokens, 1),
        median_us=round(whole.median_us / new_tokens, 1),
        peer=whole.peer,
        peer_best_us=round(whole.peer_best_us / new_tokens, 1),
        times_as_fast_as_peer=whole.times_as_fast_as_peer,
    )


def measure(repeats: int) -> list[Measured]:
    model, reference = load_model(TINY_MOE), build_reference(TINY_MOE)
    repeats = min(repeats, 3)  # a repeat is a whole generation of some seconds
    cases = [(1, 64, 128), (4, 64, 128), (16, 64, 128), (1, 1500, 1)]
    return [case(model, reference, *sizes, repeats) for sizes in cases]


if __name__ == "__main__":
    report("decode", measure)
