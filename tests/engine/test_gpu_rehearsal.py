"""The rehearsal: which waves, that they leave no trace, and that nothing compiles after it."""

from __future__ import annotations

import pytest
import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.compile_counter import CompileCounter
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuPrefill
from duomo.engine.gpu_rehearsal import WaveLimits, rehearse, waves_to_rehearse
from duomo.models.gpu_decoder import GpuDecoder
from tests.models.small_decoders import Sizes, small_decoder


def test_the_waves() -> None:
    waves = waves_to_rehearse(WaveLimits(max_tokens=5000, max_prompts=40, max_prompt_tokens=2000))
    totals = [sum(wave.lengths) for wave in waves]
    assert totals[0] == 5000 and totals == sorted(totals, reverse=True)
    assert {1, 2, 16, 17, 128, 129, 1024, 1025, 1280, 4096, 4097} <= set(totals)
    assert all(max(wave.lengths) <= 2000 and len(wave.lengths) <= 40 for wave in waves)
    assert {1, 2, 3, 17, 33, 40} <= {len(wave.lengths) for wave in waves if wave.has_prefix}
    assert all((length,) in {wave.lengths for wave in waves} for length in (1024, 1280, 1536, 1792))
    assert len(waves) < 250


def test_small_limits() -> None:
    waves = waves_to_rehearse(WaveLimits(max_tokens=1, max_prompts=8, max_prompt_tokens=64))
    assert {(wave.lengths, wave.has_prefix) for wave in waves} == {((1,), False), ((1,), True)}


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_it_touches_no_key(is_deterministic: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    half = torch.bfloat16 if device.type == "cuda" else torch.float16
    few = Sizes(num_layers=1, hidden=32, num_heads=2, num_kv_heads=1, num_experts=4, expert_hidden=32)
    weights = small_decoder("qwen3_moe", dtype=half, device=device, sizes=few).weights
    cache = GpuKvCache(gpu_kv_spec(weights.config, dtype=half), 2, device)
    cache.tensor.fill_(torch.nan)
    rehearse(
        GpuPrefill(GpuDecoder(weights, is_deterministic=is_deterministic), cache),
        WaveLimits(max_tokens=2, max_prompts=2, max_prompt_tokens=2),
    )
    assert cache.tensor.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3_moe", "llama"])
def test_nothing_compiles_after_it(family: str) -> None:
    sizes = Sizes(num_layers=2, hidden=256, num_heads=4, num_kv_heads=2, head_dim=64, num_experts=16, top_k=4, expert_hidden=128)
    device, made = torch.device("cuda"), torch.Generator().manual_seed(0)
    weights = small_decoder(family, dtype=torch.bfloat16, device=device, sizes=sizes).weights
    prefill = GpuPrefill(GpuDecoder(weights), GpuKvCache(gpu_kv_spec(weights.config), 128, device))
    counter = CompileCounter()
    try:
        rehearse(prefill, WaveLimits(max_tokens=4096, max_prompts=32, max_prompt_tokens=1024))
        assert counter.num_before_ready > 0
        counter.ready()
        for _ in range(60):
            num_prompts = int(torch.randint(1, 33, (), generator=made))
            most = 2 ** int(torch.randint(0, 11, (), generator=made))
            lengths = torch.randint(1, min(most, 4096 // num_prompts) + 1, (num_prompts,), generator=made).tolist()
            tables = torch.arange(128).view(32, 4).tolist()
            slices = tuple(
                PromptSlice(token_ids=[5] * min(n, 250), start=start, block_table=table)
                for n, start, table in zip(lengths, torch.randint(0, 2, (num_prompts,), generator=made).tolist(), tables, strict=False)
            )
            prefill.run(StepBatch(slices=slices))
        assert counter.num_after_ready == 0
    finally:
        counter.close()
