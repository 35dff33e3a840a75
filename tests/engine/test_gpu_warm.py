"""Which waves run before ready, and that they run; what compiling ahead compiles, for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_prefill import LaunchedChunk
from duomo.engine.gpu_warm import _warm_layers, ladder, launch_kinds, warm_prefill, warm_waves
from duomo.engine.memory_plan import MemoryLimits
from duomo.models.gpu_decoder import GpuDecoder
from tests.engine.gpu_tiny import tiny_engine

LIMITS = MemoryLimits(max_batch=4, max_wave_tokens=8192, max_model_tokens=4096)

# A process of its own: this one's kernels may be interpreted.
COMPILES = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from duomo.engine.compile_counter import CompileCounter
from duomo.engine.gpu_compile_ahead import compiling_ahead

class Absent:
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

@triton.jit
def body(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i, mask=i < n)

driver.set_active(Absent())
counter, x = CompileCounter(), torch.full((16,), 7, dtype=torch.int32)
with compiling_ahead(2):
    for size in (16, 32, 32, 64):
        body[(1,)](x, 5, BLOCK=size)
print(counter.num_before_ready, x.tolist() == [7] * 16)
counter.ready()
body.warmup(x, 5, BLOCK=64, grid=(1,))
print(counter.num_after_ready)
"""


def test_the_ladder_has_every_kind_of_size_in_every_range() -> None:
    sizes = ladder(8192)
    assert sizes[0] == 1 and sizes[-1] == 8192 and max(b / a for a, b in zip(sizes[8:], sizes[9:], strict=False)) <= 1.5
    for low in (16, 64, 512, 4096):
        near = [size for size in sizes if low <= size < 2 * low]
        assert {size % 16 == 0 for size in near} == {True, False} and {size % 2 for size in near} == {0, 1}
    assert ladder(1) == [1] and ladder(100)[-1] == 100


def test_waves_stay_within_limits_and_pool() -> None:
    waves = warm_waves(LIMITS, num_blocks=1000)
    assert {wave.num_prompts for wave in waves} >= {1, 2, 3, 16} and {wave.prefix_blocks for wave in waves} == {0, 1}
    assert max(wave.num_tokens for wave in waves) == 8192
    assert max(wave.num_tokens for wave in warm_waves(LIMITS, num_blocks=10)) <= 640


def test_waves_run_and_leave_the_pool_empty() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = tiny_engine(device)
    warm_prefill(engine.prefill, MemoryLimits(max_batch=2, max_wave_tokens=3, max_model_tokens=16, block_tokens=16))
    assert not engine.cache.tensor.any()


def test_kernels_are_compiled_by_threads_and_do_not_run(tmp_path: Path) -> None:
    script = tmp_path / "compiles.py"
    script.write_text(COMPILES)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split("\n")[:2] == ["3 True", "0"], done.stderr


def test_the_last_chunk_of_a_long_prompt_runs_behind_all_of_its_keys() -> None:
    limits = MemoryLimits(max_batch=4, max_wave_tokens=2048, max_model_tokens=131072)
    last = [wave for wave in warm_waves(limits, num_blocks=2048) if wave.prefix_blocks > 1]
    assert [(wave.num_tokens, 64 * wave.prefix_blocks + wave.num_tokens) for wave in last] == [(8192, 131072)]
    assert not [wave for wave in warm_waves(limits, num_blocks=2047) if wave.prefix_blocks > 1], "a pool that does not hold it"
    assert max(wave.num_tokens for wave in warm_waves(limits, num_blocks=2048)) == 8192


def test_a_layer_of_every_kind_is_run() -> None:
    """Checkpoints in fp8 may keep some layers wide."""
    engine = tiny_engine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    weights, prefill, ran = engine.decoder.weights, engine.prefill, list[int]()
    assert weights.first_of_kinds == (0,) and _warm_layers(prefill) == [0, 1]
    plain = weights.layers[0]
    bare = replace(plain, qk_norm=None)
    prefill.decoder = GpuDecoder(replace(weights, layers=(plain, plain, plain, bare, plain, bare)))
    assert prefill.decoder.weights.first_of_kinds == (0, 3)

    def witnessed(layer_idx: int, at: LaunchedChunk) -> torch.Tensor:
        ran.append(layer_idx)
        return torch.empty(0)

    prefill.launch_layer = witnessed  # type: ignore[method-assign]  # a witness of the layers
    launch_kinds(prefill, StepBatch(slices=(PromptSlice(token_ids=(1,), start=0, block_table=(0,)),)))
    assert ran == [0, 1, 3]
