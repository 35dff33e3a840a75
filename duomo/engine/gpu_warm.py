"""Owns the waves that are run before an engine is ready, so that no prompt waits for a compiler. Knows no request.

Triton compiles a kernel anew for another configuration, which goes by ranges of rows, and for sizes that are 1, multiples of 16, or neither
(of rows, and of rows times experts a token). So waves are of every size on a ladder whose steps are at most half as large again, and of the
two above it; of one, several and sixteen prompts, with and without a cached prefix; single prompts of every length cuDNN plans for; and
the last chunk of a long prompt, behind all that is in the pool of it. Of each wave the first layer, which adds to no residual, the second,
and one of every kind of layer that the weights have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_compile_ahead import compiling_ahead
from duomo.engine.gpu_prefill import GpuPrefill, LaunchedChunk
from duomo.engine.gpu_wave import upload_rows
from duomo.engine.gpu_wave_attention import LIBRARY_MIN_TOKENS, LIBRARY_STEP
from duomo.engine.memory_plan import MemoryLimits
from duomo.engine.wave_buckets import MAX_WAVE_PROMPTS

FEW = (1, 2, 3, 4, 5, 8, 9, 16)
MIXED_TOKENS = (48, 1024)  # in waves of several prompts and with prefixes: attention's variants are not the rows'


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmWave:
    """num_prompts of num_tokens together, each behind prefix_blocks of cached blocks."""

    num_tokens: int
    num_prompts: int = 1
    prefix_blocks: int = 0


def ladder(max_tokens: int) -> list[int]:
    """Sizes up to max_tokens, max_tokens itself among them."""
    sizes, step = set(FEW), 16
    while step <= max_tokens:
        sizes |= {base + more for base in (step, step + step // 2) for more in (0, 1, 2)}
        step *= 2
    return sorted(size for size in sizes | {max_tokens} if size <= max_tokens)


def warm_waves(limits: MemoryLimits, num_blocks: int) -> list[WarmWave]:
    """What to run, as far as num_blocks hold it."""
    whole = [WarmWave(num_tokens=size, num_prompts=-(-size // limits.max_model_tokens)) for size in ladder(limits.most_rows)]
    mixed = [
        WarmWave(num_tokens=size + more, num_prompts=num_prompts, prefix_blocks=prefix_blocks)
        for size in MIXED_TOKENS
        for more in (0, 1)
        for num_prompts in (1, 2, 3, MAX_WAVE_PROMPTS)
        for prefix_blocks in (0, 1)
    ]
    # cuDNN plans by length, and the thread keeps its plans: whoever serves must be the thread that warms
    longest = min(limits.most_rows, limits.max_model_tokens)
    planned = [WarmWave(num_tokens=size) for size in range(LIBRARY_MIN_TOKENS, longest + 1, LIBRARY_STEP)]
    last = WarmWave(num_tokens=limits.most_rows, prefix_blocks=(limits.max_model_tokens - limits.most_rows) // limits.block_tokens)
    return [wave for wave in dict.fromkeys((*whole, *mixed, *planned, last)) if _fits(wave, limits, num_blocks)]


def warm_prefill(prefill: GpuPrefill, limits: MemoryLimits) -> None:
    """Compile for every wave by threads, then run each, and the first one whole. Writes into blocks from 0 on: nobody holds one yet."""
    batches = [_batch_of(wave, limits.block_tokens) for wave in warm_waves(limits, prefill.cache.num_blocks)]
    with compiling_ahead():
        for batch in batches:
            launch_kinds(prefill, batch)
    for batch in batches:
        launch_kinds(prefill, batch)
    prefill.run(batches[0])[0].expert_use()
    prefill.cache.tensor.zero_()


@torch.inference_mode()
def launch_kinds(prefill: GpuPrefill, batch: StepBatch) -> None:
    """What a wave launches, once each. Nothing is counted: while kernels are compiled ahead none runs, and routed ids may be any number."""
    at = prefill.begin(batch).begun[0]
    assert isinstance(at, LaunchedChunk), "before graphs are captured"
    for layer_idx in _warm_layers(prefill):
        prefill.launch_layer(layer_idx, at)
    prefill.decoder.logits(at.rows.select(upload_rows(batch.last_rows, prefill.cache.device)))


def _warm_layers(prefill: GpuPrefill) -> list[int]:
    """In ascending order, each once."""
    weights = prefill.decoder.weights
    return sorted({0, min(1, len(weights.layers) - 1), *weights.first_of_kinds})


def _fits(wave: WarmWave, limits: MemoryLimits, num_blocks: int) -> bool:
    tokens_each = -(-wave.num_tokens // wave.num_prompts) + wave.prefix_blocks * limits.block_tokens
    is_short = wave.num_prompts <= wave.num_tokens <= limits.most_rows and tokens_each <= limits.max_model_tokens
    return is_short and wave.prefix_blocks >= 0 and wave.num_prompts * -(-tokens_each // limits.block_tokens) <= num_blocks


def _batch_of(wave: WarmWave, block_tokens: int) -> StepBatch:
    start = wave.prefix_blocks * block_tokens
    each, rest = divmod(wave.num_tokens, wave.num_prompts)
    lengths = [each + (at < rest) for at in range(wave.num_prompts)]
    width = -(-(start + max(lengths)) // block_tokens)
    slices = (
        PromptSlice(token_ids=(0,) * length, start=start, block_table=range(at * width, (at + 1) * width))
        for at, length in enumerate(lengths)
    )
    return StepBatch(slices=tuple(slices))
