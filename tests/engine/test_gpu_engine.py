"""The start of an engine: phases, plan, refusals; on a GPU what was measured."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import DecodeRow, DecodeStep
from duomo.engine.gpu_engine import EngineStart, start_engine
from duomo.engine.memory_plan import DeviceBytes, MemoryLimits
from duomo.engine.startup import Startup
from duomo.errors import ConfigError
from duomo.models.gpu_random import random_gpu_weights
from duomo.models.gpu_weights import GpuWeights
from tests.engine.gpu_tiny import TINY, WIDE, joining

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LIMITS = MemoryLimits(max_batch=2, max_wave_tokens=32, max_model_tokens=64, block_tokens=16, dtype_bytes=4)
MB = 10**6


def never_loaded() -> GpuWeights:
    raise AssertionError("loaded what cannot fit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU: the test below starts one there")
def test_an_engine_starts_in_phases_and_serves_a_step() -> None:
    load = partial(random_gpu_weights, TINY, device=CPU, dtype=torch.float32, std=0.125)
    start = EngineStart(config=TINY, load=load, limits=LIMITS, device=CPU, memory=DeviceBytes(total=14 * MB, free=14 * MB))
    startup = Startup()
    engine = start_engine(start, startup)
    try:
        assert [phase.name for phase in startup.phases] == ["weights", "profile", "capture"]
        assert engine.cache.num_blocks == engine.plan.num_blocks >= 4
        assert engine.prefill.cache is engine.cache is engine.decode.cache
        row = DecodeRow(source=joining((), 7), position=0, table=[1])
        assert not engine.decode.launch(DecodeStep(rows=(row,))).wait().errors
    finally:
        engine.compilations.close()


def test_what_cannot_fit_is_refused_before_it_is_loaded() -> None:
    start = EngineStart(config=TINY, load=never_loaded, limits=LIMITS, device=CPU, memory=DeviceBytes(total=MB // 4, free=MB // 4))
    with pytest.raises(ConfigError, match="KV blocks, but 4 are needed"):
        start_engine(start, Startup())


def test_weights_that_take_more_than_estimated_are_refused_in_words() -> None:
    def too_large() -> GpuWeights:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    start = EngineStart(config=TINY, load=too_large, limits=LIMITS, device=CPU, memory=DeviceBytes(total=80_000 * MB, free=75_000 * MB))
    with pytest.raises(ConfigError, match="the weights do not fit: .*80.0 GB on the device, 75.0 GB of them free") as refused:
        start_engine(start, Startup())
    assert refused.value.code == "does_not_fit"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")
def test_a_gpu_is_measured_and_nothing_is_compiled_after_ready() -> None:
    limits = replace(LIMITS, max_batch=16, max_wave_tokens=2048, max_model_tokens=512, block_tokens=64, dtype_bytes=2)
    free, total = torch.cuda.mem_get_info()
    limits = replace(limits, gpu_memory_fraction=(total - free + 2 * 10**9) / total)  # leave the card to others
    load = partial(random_gpu_weights, WIDE, device=CUDA, std=WIDE.hidden**-0.5)
    engine = start_engine(EngineStart(config=WIDE, load=load, limits=limits, device=CUDA), Startup())
    try:
        measured = engine.plan.measured
        assert measured.weights is not None and measured.activations is not None and measured.activations > 0
        assert engine.plan.kv == engine.cache.tensor.nbytes > 0
        for count in (1, 3, 16):
            rows = tuple(DecodeRow(source=joining((), 7 + at), position=0, table=[at]) for at in range(count))
            assert not engine.decode.launch(DecodeStep(rows=rows)).wait().errors
        for lengths in ((1,), (7,), (100,), (333, 12), (512,) * 4, (511,), (2, 3, 4, 5, 6)):
            for start in (0, 64):
                slices = (
                    PromptSlice(token_ids=(5,) * min(length, 512 - start), start=start, block_table=range(8 * at, 8 * at + 8))
                    for at, length in enumerate(lengths)
                )
                engine.prefill.run(StepBatch(slices=tuple(slices)))
        assert engine.compilations.num_after_ready == 0
    finally:
        engine.compilations.close()
