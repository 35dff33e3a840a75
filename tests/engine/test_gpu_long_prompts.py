"""Prompts far longer than a wave on a GPU: bounded memory, whatever the chunks; the same bits in other chunks where deterministic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_engine import EngineStart, GpuEngine, start_engine
from duomo.engine.gpu_prefill import GpuBoundaryState
from duomo.engine.memory_plan import MemoryLimits
from duomo.engine.startup import Startup
from duomo.models.config import load_config
from duomo.models.gpu_random import random_gpu_weights
from tests.engine.grid_walks import layered
from tests.engine.test_gpu_chunks import TINY_MOE

CUDA = torch.device("cuda")
NUM_TOKENS = 100_000
LIMITS = MemoryLimits(max_batch=2, max_wave_tokens=2048, max_model_tokens=131072)


def started() -> GpuEngine:
    """The embedded model's architecture with a long context; random weights, so that attention looks everywhere."""
    config = replace(load_config(TINY_MOE), max_position_tokens=131072, quantisation=None)
    free, total = torch.cuda.mem_get_info()
    limits = replace(LIMITS, gpu_memory_fraction=(total - free + 6 * 10**9) / total)  # leave the card to others
    load = partial(random_gpu_weights, config, device=CUDA, std=config.hidden**-0.5)
    return start_engine(EngineStart(config=config, load=load, limits=limits, device=CUDA, is_deterministic=True), Startup())


def prefilled(engine: GpuEngine, batch: StepBatch, chunk_tokens: int) -> tuple[GpuBoundaryState, Tensor]:
    """Two layers a piece, all chunks through them."""
    state = engine.prefill.begin(batch, chunk_tokens)
    for (lo, hi), chunks in layered(engine.prefill.decoder.config.num_layers, state.num_chunks, 2):
        engine.prefill.run_layers(lo, hi, state, chunks)
    return state, engine.prefill.logits(state, batch.last_rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's memory")
@pytest.mark.timeout(300)
def test_100k_tokens_take_a_chunks_memory_and_their_rows() -> None:
    engine = started()
    try:
        config, plan = engine.prefill.decoder.config, engine.plan
        made = torch.Generator().manual_seed(2)
        token_ids = torch.randint(3, config.vocab, (NUM_TOKENS,), generator=made).tolist()
        table = torch.randperm(plan.num_blocks, generator=made).tolist()[: -(-NUM_TOKENS // plan.block_tokens)]
        batch = StepBatch(slices=(PromptSlice(token_ids=token_ids, start=0, block_table=table),))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        state, logits_SV = prefilled(engine, batch, 8192)
        use = state.expert_use()
        taken = torch.cuda.max_memory_allocated() - before
        assert state.num_chunks == 13 and logits_SV.isfinite().all()
        assert taken <= plan.activations + plan.rows, (taken, plan.lines())
        assert (use.counts_SLE.sum(-1) == NUM_TOKENS * config.top_k).all()
        assert use.bytes_read <= 13 * sum(config.num_experts * layer.expert_bytes for layer in engine.prefill.decoder.weights.layers)
        del state
        again, their_logits = prefilled(engine, batch, 4096)
        assert torch.equal(their_logits, logits_SV) and torch.equal(again.expert_counts, use.counts_SLE)
        assert engine.compilations.num_after_ready == 0
    finally:
        engine.compilations.close()
