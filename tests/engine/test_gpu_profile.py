"""What is measured of a GPU's memory: waves that fill a step, and a long prompt's last chunk behind all of its keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.gpu_profile import profile_waves, wave_bytes
from duomo.engine.memory_plan import MemoryLimits, activation_bytes
from tests.engine.gpu_tiny import WIDE, engine_of, tiny_engine

LIMITS = MemoryLimits(max_batch=4, max_wave_tokens=2048, max_model_tokens=512)


def shapes(limits: MemoryLimits) -> list[list[tuple[int, int]]]:
    """(start, end) of each slice of each wave; tables must hold them."""
    waves = profile_waves(limits)
    for wave in waves:
        assert all(len(part.block_table) * limits.block_tokens >= part.end for part in wave.slices)
        own = [block for part in wave.slices for block in part.block_table[part.start // limits.block_tokens :]]
        assert len(own) == len(set(own)), "no two rows write the same key"
    return [[(part.start, part.end) for part in wave.slices] for wave in waves]


def test_short_prompts_fill_a_wave() -> None:
    assert shapes(LIMITS) == [[(0, 512)] * 4]
    assert shapes(MemoryLimits(max_batch=4, max_wave_tokens=1000, max_model_tokens=700)) == [[(0, 700), (0, 300)]]


def test_a_long_prompts_last_chunk_is_behind_all_of_its_keys() -> None:
    limits = MemoryLimits(max_batch=4, max_wave_tokens=2048, max_model_tokens=131072)
    assert shapes(limits) == [[(0, 8192)], [(131072 - 8192, 131072)]]
    assert max(max(part.block_table) for wave in profile_waves(limits) for part in wave.slices) < 129, "its cached keys take no memory"
    assert shapes(MemoryLimits(max_batch=4, max_wave_tokens=2048, max_model_tokens=8192)) == [[(0, 8192)]]


def test_a_processor_has_nothing_to_measure() -> None:
    if not torch.cuda.is_available():
        assert wave_bytes(tiny_engine(torch.device("cpu")).decoder, LIMITS) is None


@pytest.mark.gpu
def test_what_is_measured_is_near_what_is_estimated() -> None:
    """A small model in bf16: allocator's rounding and libraries' workspaces come on top, the estimate is of the right size."""
    decoder = engine_of(replace(WIDE, max_position_tokens=131072), torch.device("cuda"), 1, 64).decoder
    limits = MemoryLimits(max_batch=4, max_wave_tokens=2048, max_model_tokens=131072)
    found, estimated = wave_bytes(decoder, limits), activation_bytes(decoder.config, limits.most_rows)
    assert found is not None and 0.3 * estimated < found < 3 * estimated + 2**27, (found, estimated)
