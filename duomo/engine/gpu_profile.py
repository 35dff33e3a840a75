"""Owns the measurement of what waves take of one GPU's memory, before there is a pool. Knows no plan and no graph.

Two waves run, each of one token over and over: all of it goes to the same experts, the worst routing there is. (Kernels' tensors are as
large as any routing needs; were one not, it would show here.) One has as many rows as may cross a layer together; the other is the last
chunk of the longest prompt, behind all that is in the pool of it. What earlier chunks leave between two pieces is counted by the plan.
"""

from __future__ import annotations

import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_compile_ahead import compiling_ahead
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuPrefill
from duomo.engine.gpu_warm import launch_kinds
from duomo.engine.memory_plan import MemoryLimits
from duomo.models.gpu_decoder import GpuDecoder


def wave_bytes(decoder: GpuDecoder, limits: MemoryLimits) -> int | None:
    """The allocator's peak over both waves, less their pool of KV; None where there is no device to ask."""
    if decoder.weights.device.type != "cuda":
        return None
    peak = _peak(decoder, limits)
    torch.cuda.empty_cache()  # the waves' pool too, which has gone with the frame that held it
    return peak


def profile_waves(limits: MemoryLimits) -> list[StepBatch]:
    """What is measured; blocks from 0 on. Cached keys are read from one block over and over: what they are is nobody's concern."""
    block_tokens, longest, most = limits.block_tokens, limits.max_model_tokens, limits.most_rows
    lengths = [longest] * (most // longest) + ([most % longest] if most % longest else [])
    each = -(-max(lengths) // block_tokens)
    whole = StepBatch(
        slices=tuple(
            PromptSlice(token_ids=(0,) * length, start=0, block_table=range(at * each, (at + 1) * each))
            for at, length in enumerate(lengths)
        )
    )
    cached_blocks = (longest - most) // block_tokens
    if cached_blocks <= 0:
        return [whole]
    table = [0] * cached_blocks + list(range(-(-most // block_tokens)))
    last = PromptSlice(token_ids=(0,) * most, start=cached_blocks * block_tokens, block_table=table)
    return [whole, StepBatch(slices=(last,))]


def _peak(decoder: GpuDecoder, limits: MemoryLimits) -> int:
    device, batches = decoder.weights.device, profile_waves(limits)
    num_blocks = 1 + max(max(part.block_table) for batch in batches for part in batch.slices)
    cache = GpuKvCache(gpu_kv_spec(decoder.config, block_tokens=limits.block_tokens, dtype=decoder.weights.dtype), num_blocks, device)
    prefill = GpuPrefill(decoder, cache)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    with compiling_ahead():
        for batch in batches:
            launch_kinds(prefill, batch)
    torch.cuda.empty_cache()
    for batch in batches:
        prefill.run(batch)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_reserved(device) - before)
