"""The one-loop engine: continuous batching, chunks, a small pool and the prefix cache change no token."""

from __future__ import annotations

import torch

from duomo.engine.monolith import GenerateRequest, Monolith, MonolithLimits, generate
from duomo.models.qwen3_moe import Model
from duomo.wire.values import Sampling


def requests() -> list[GenerateRequest]:
    made = []
    for at, length in enumerate((1, 15, 16, 17, 63, 130)):
        ids = torch.randint(3, 8192, (length,), generator=torch.Generator().manual_seed(at)).tolist()
        sampling = Sampling(
            max_tokens=3 + at, temperature=0.0 if at % 2 else 0.9, seed=at, top_p=0.95, ignore_eos=True, repetition_penalty=1.1
        )
        made.append(GenerateRequest(prompt_ids=ids, sampling=sampling, choice=at))
    return made


def test_batching_and_small_pools_change_nothing(model: Model) -> None:
    asked = requests()
    together = generate(model, asked)
    assert [len(tokens) for tokens in together] == [request.sampling.max_tokens for request in asked]
    assert [generate(model, [request])[0] for request in asked] == together
    limits = MonolithLimits(num_blocks=13, max_batch=3, max_step_tokens=37)
    assert generate(model, asked, limits) == together


def test_prefix_cache_changes_no_token_and_loses_no_block(model: Model) -> None:
    shared = torch.randint(3, 8192, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    sampling = Sampling(max_tokens=5, temperature=0.0, ignore_eos=True)
    asked = [GenerateRequest(prompt_ids=shared + [at + 3] * at, sampling=sampling) for at in range(4)]
    plain = generate(model, asked)
    loop = Monolith(model, MonolithLimits(max_batch=1, prefix_cache_blocks=20), 40)
    assert loop.generate(asked) == plain
    loop.blocks.check_integrity()
    assert loop.blocks.num_cached >= 5 and loop.blocks.num_free + loop.blocks.num_cached == 40
    assert loop.generate(asked) == plain


def test_eos_and_stop_ids_end_a_choice(model: Model) -> None:
    free = generate(model, [GenerateRequest(prompt_ids=[5, 6, 7], sampling=Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))])[0]
    stop = free[3].token_id
    first = next(at for at, token in enumerate(free) if token.token_id == stop)
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    assert generate(model, [GenerateRequest(prompt_ids=[5, 6, 7], sampling=sampling)])[0] == free[: first + 1]
