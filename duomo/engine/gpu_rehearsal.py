"""Owns the waves that a prefill runs before it is ready, so that none after it compiles or plans. Knows no kernel's thresholds.

Which variant of a kernel a wave takes is told by its number of rows and of prompts, by whether anything is cached, never by contents. So
waves of many sizes go through one layer (all layers are alike), launched even where graphs are there to replay, with rows that have no
slot: no key is written. Sizes lie eight to an octave, each with its successor: thresholds are round numbers, and none lies so close to the
next that all of these miss what is between.
cuDNN plans by length, and torch keeps the plans for the thread: whoever serves must be the thread that rehearsed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_prefill import GpuPrefill
from duomo.engine.gpu_wave_attention import LIBRARY_MIN_TOKENS, LIBRARY_STEP


@dataclass(frozen=True, kw_only=True, slots=True)
class WaveLimits:
    """The largest wave that will be served: its tokens, its prompts, a prompt's tokens."""

    max_tokens: int
    max_prompts: int
    max_prompt_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RehearsedWave:
    """Lengths of prompts; has_prefix: as if keys were cached."""

    lengths: tuple[int, ...]
    has_prefix: bool = False


def waves_to_rehearse(limits: WaveLimits) -> list[RehearsedWave]:
    """Largest first, so that memory is asked for once."""
    waves = {RehearsedWave(lengths=_spread(size, limits.max_prompt_tokens)) for size in _sizes(limits.max_tokens)}
    longest = min(limits.max_tokens, limits.max_prompt_tokens)
    waves |= {RehearsedWave(lengths=(length,)) for length in range(LIBRARY_MIN_TOKENS, longest + 1, LIBRARY_STEP)}
    for num_prompts in _sizes(min(limits.max_prompts, limits.max_tokens)):
        # one longer than the others: equal lengths might be the library's
        lengths = (min(2, limits.max_tokens - num_prompts + 1, limits.max_prompt_tokens), *(1,) * (num_prompts - 1))
        waves |= {RehearsedWave(lengths=lengths, has_prefix=has_prefix) for has_prefix in (False, True)}
    return sorted(waves, key=lambda wave: (-sum(wave.lengths), wave.lengths, wave.has_prefix))


@torch.inference_mode()
def rehearse(prefill: GpuPrefill, limits: WaveLimits, *, progress: bool = False) -> None:
    """Run them. Touches no KV. progress shows a bar on stderr."""
    waves = waves_to_rehearse(limits)
    for wave in tqdm(waves, desc="rehearsing waves", unit="wave", file=sys.stderr, disable=not progress, leave=False):
        _run_one_layer(prefill, wave)


def _run_one_layer(prefill: GpuPrefill, wave: RehearsedWave) -> None:
    block_tokens = prefill.cache.spec.block_tokens
    slices = tuple(PromptSlice(token_ids=[0] * n, start=0, block_table=[0] * (-(-n // block_tokens))) for n in wave.lengths)
    batch = StepBatch(slices=slices)
    state = prefill.begin(batch)
    no_slot_T = torch.full_like(state.wave.slot_T, -1)
    state.wave = replace(state.wave, slot_T=no_slot_T, has_prefix=wave.has_prefix)
    prefill.launch_layers(0, 1, state)
    last_S = state.wave.cu_seqlens_S1[1:].long() - 1
    prefill.decoder.logits(state.rows.select(last_S))


def _sizes(most: int) -> list[int]:
    """1 .. 16, then eight to an octave, each with its successor; `most` itself."""
    sizes = {most, *range(1, 17)}
    octave = 16
    while octave < most:
        sizes |= {octave + octave * eighth // 8 + more for eighth in range(8) for more in (0, 1)}
        octave *= 2
    return sorted(size for size in sizes if size <= most)


def _spread(num_tokens: int, max_prompt_tokens: int) -> tuple[int, ...]:
    """As few prompts as hold so many tokens."""
    whole, rest = divmod(num_tokens, max_prompt_tokens)
    return (max_prompt_tokens,) * whole + ((rest,) if rest else ())
