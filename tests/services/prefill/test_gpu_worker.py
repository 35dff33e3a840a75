"""The prefill worker over a GPU's engine, in Triton's interpreter where there is none: pieces, chunks, and what a wave read."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.memory_plan import DeviceBytes, MemoryLimits
from duomo.engine.sampler import RowSampling
from duomo.engine.startup import Startup
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.messages import Sampling
from services.prefill.gpu_worker import GpuPrefillWorker
from services.prefill.pieces import Piece
from services.prefill.worker import WaveOutput, WaveRow, WorkerSizes
from tests.engine.gpu_tiny import TINY
from tests.interpreter import prepare

prepare()

CPU = torch.device("cpu")
PROMPTS = [tuple(range(10, 43)), tuple(range(20, 29))]
ROWS = [WaveRow(token_ids=PROMPTS[0], start=0, block_table=(4, 1, 3)), WaveRow(token_ids=PROMPTS[1], start=0, block_table=(0,))]
GREEDY = Sampling(max_tokens=4, temperature=0.0)


@pytest.fixture(scope="module")
def engine() -> GpuEngine:
    limits = MemoryLimits(max_batch=2, max_wave_tokens=32, max_model_tokens=64, block_tokens=16, dtype_bytes=4)
    load = partial(random_gpu_weights, TINY, device=CPU, dtype=torch.float32, std=0.125)
    memory = DeviceBytes(total=9_000_000, free=9_000_000)
    start = EngineStart(config=TINY, load=load, limits=limits, device=CPU, memory=memory, is_deterministic=True)
    made = start_engine(start, Startup())
    made.compilations.close()
    return made


def outputs(engine: GpuEngine, chunk_tokens: int | None, *pieces: Piece) -> tuple[WaveOutput, ...]:
    sizes = WorkerSizes(num_blocks=engine.plan.num_blocks, block_tokens=16, units=2, units_per_group=1, torch_threads=1)
    worker = GpuPrefillWorker(engine, sizes)
    computation = worker.begin(ROWS, chunk_tokens)
    for piece in pieces:
        worker.run_piece(computation, piece).wait()
    samplings = [[RowSampling(sampling=GREEDY, choice=0, prompt_ids=ids, output_ids=())] for ids in PROMPTS]
    return worker.sample(computation, samplings).wait()


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted where there is a GPU")
def test_pieces_and_chunks_say_the_same_and_what_they_read(engine: GpuEngine) -> None:
    """float32: rows of other chunks sum in another order by too little to choose otherwise."""
    whole = outputs(engine, None, Piece(groups=(0, 2), chunks=(0, 1)))
    layered = outputs(engine, 16, *(Piece(groups=(group, group + 1), chunks=(0, 3)) for group in (0, 1)))
    chunked = outputs(engine, 16, *(Piece(groups=(0, 2), chunks=(chunk, chunk + 1)) for chunk in range(3)))
    experts = engine.prefill.decoder.weights.layers[0].expert_bytes
    assert whole[0].expert_bytes % experts == 0 and whole[1].expert_bytes == 0
    assert 0 < whole[0].expert_bytes <= 2 * TINY.num_experts * experts
    assert layered[0].expert_bytes == chunked[0].expert_bytes > whole[0].expert_bytes
    for other in (layered, chunked):
        for mine, theirs, prompt in zip(whole, other, PROMPTS, strict=True):
            assert theirs.error is None and [token.token_id for token in mine.sampled] == [token.token_id for token in theirs.sampled]
            assert theirs.expert_counts.dtype == np.dtype(np.int32) and theirs.expert_counts.flags.c_contiguous
            assert np.array_equal(mine.expert_counts, theirs.expert_counts)
            assert (mine.expert_counts.sum(1) == len(prompt) * TINY.top_k).all()
