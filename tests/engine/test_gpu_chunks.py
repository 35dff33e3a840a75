"""Chunks and pieces on the GPU's engine: every walk of a wave's grid gives the same bits, captured or launched; what is counted.

In Triton's interpreter small waves; on a GPU those that graphs, our attention and cuDNN take.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the GPU's engine is made of Triton kernels")

from bench.reference.float64_decoder import float64_run
from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.gpu_captured_layers import CapturedLimits
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuBoundaryState, GpuPrefill
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_load import load_gpu_weights
from duomo.models.gpu_weights import GpuWeights
from duomo.models.qwen3_moe import Model
from duomo_kernels._bounds import error
from tests.engine.grid_walks import Cell, chunked, drawn, layered
from tests.models.small_decoders import FAMILIES, Sizes, decoder_bound, small_decoder

TINY_MOE = Path(__file__).parents[2] / "models" / "tiny-moe"
IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
HALF = torch.bfloat16 if IS_GPU else torch.float16
TOKENS = torch.randint(3, 100, (4096,), generator=torch.Generator().manual_seed(1)).tolist()
FEW = Sizes(hidden=32, num_heads=2, num_kv_heads=1, num_experts=4, expert_hidden=32)
WIDE = Sizes(num_layers=3, hidden=512, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=16, top_k=4, expert_hidden=384)


@pytest.fixture(scope="module")
def weights() -> GpuWeights:
    return small_decoder("qwen3_moe", dtype=HALF, device=DEVICE, sizes=FEW).weights


@dataclass(frozen=True, kw_only=True)
class Pool:
    """captured: rows up to which layers are captured, 0 for none."""

    num_blocks: int = 8
    block_tokens: int = 16
    captured: int = 0
    is_deterministic: bool = False

    def prefill(self, weights: GpuWeights) -> GpuPrefill:
        cache = GpuKvCache(gpu_kv_spec(weights.config, block_tokens=self.block_tokens, dtype=weights.dtype), self.num_blocks, DEVICE)
        cache.tensor.fill_(torch.nan)  # a key that was not written shows
        prefill = GpuPrefill(GpuDecoder(weights, is_deterministic=self.is_deterministic), cache)
        if self.captured:
            longest = self.num_blocks * self.block_tokens
            prefill.capture(CapturedLimits(max_rows=self.captured, max_sequences=4, max_sequence_tokens=longest))
        return prefill

    def wave(self, *lengths: int) -> StepBatch:
        """Prompts side by side in the pool, their blocks in a drawn order."""
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(8)).tolist()
        slices, at = [], 0
        for length in lengths:
            width = -(-length // self.block_tokens)
            slices.append(PromptSlice(token_ids=TOKENS[:length], start=0, block_table=order[at : at + width]))
            at += width
        assert at <= self.num_blocks
        return StepBatch(slices=tuple(slices))


def walked(
    prefill: GpuPrefill, batch: StepBatch, chunk_tokens: int | None, walk: Iterable[Cell] | None = None, other: StepBatch | None = None
) -> tuple[GpuBoundaryState, Tensor]:
    """State and logits of every row; `other` is a wave that runs a layer between every two pieces."""
    state = prefill.begin(batch, chunk_tokens, keeps_routed=True)
    num_layers = prefill.decoder.config.num_layers
    for (lo, hi), chunks in [((0, num_layers), (0, state.num_chunks))] if walk is None else walk:
        prefill.run_layers(lo, hi, state, chunks)
        if other is not None:
            prefill.run_layers(0, 1, prefill.begin(other))
    return state, prefill.logits(state, list(range(batch.num_rows)))


def assert_is_float64s(weights: GpuWeights, state: GpuBoundaryState, logits_TV: Tensor) -> None:
    """Prompt by prompt, with the experts that its rows took."""
    limit, row = decoder_bound(weights.dtype, weights.config.num_layers), 0
    for part in state.batch.slices:
        rows = slice(row, row + len(part.token_ids))
        expected = float64_run(weights, list(part.token_ids), [ids_TK[rows] for ids_TK in state.routed_ids])
        assert not expected.misrouted(limit)
        assert error(logits_TV[rows], expected.logits_TV) <= limit
        row = rows.stop


def num_distinct(ids_TK: Tensor) -> int:
    return len(set(ids_TK.flatten().tolist()))


def assert_is_counted(weights: GpuWeights, state: GpuBoundaryState) -> None:
    """Counts and bytes by the ids themselves."""
    bounds = [0]
    for part in state.batch.slices:
        bounds.append(bounds[-1] + len(part.token_ids))
    num_bytes = 0
    for layer, ids_TK in enumerate(state.routed_ids):
        for prompt, (lo, hi) in enumerate(zip(bounds, bounds[1:], strict=False)):
            counts_E = torch.bincount(ids_TK[lo:hi].flatten(), minlength=weights.config.num_experts)
            assert torch.equal(state.expert_counts[prompt, layer], counts_E.int().cpu())
        held = weights.layers[layer].experts
        one = 3 * weights.config.hidden * weights.config.expert_hidden * held.down_EDF.element_size()
        num_bytes += one * sum(num_distinct(ids_TK[chunk.row_lo : chunk.row_hi]) for chunk in state.chunks)
    assert state.expert_bytes == num_bytes > 0
    assert state.expert_use().counts_SLE.is_contiguous()


def walks(num_layers: int, num_chunks: int, seed: int) -> list[list[Cell]]:
    made = random.Random(seed)
    return [list(walk) for walk in (layered(num_layers, num_chunks), chunked(num_layers, num_chunks), drawn(num_layers, num_chunks, made))]


@pytest.mark.parametrize(("lengths", "chunk_tokens", "captured"), [((37,), 16, 0), ((5, 1, 20), 20, 16)])
def test_every_walk_gives_the_same_bits(weights: GpuWeights, lengths: tuple[int, ...], chunk_tokens: int, captured: int) -> None:
    """All chunks launched; one launched and one captured under its keys. Between two pieces another wave runs, in the graphs' tensors."""
    pool = Pool(captured=captured)
    prefill, batch = pool.prefill(weights), pool.wave(*lengths)
    other = StepBatch(slices=(PromptSlice(token_ids=TOKENS[5:14], start=0, block_table=[pool.wave(128).slices[0].block_table[-1]]),))
    state, logits_TV = walked(prefill, batch, chunk_tokens)
    assert_is_float64s(weights, state, logits_TV)
    assert_is_counted(weights, state)
    keys = prefill.cache.tensor.nan_to_num().clone()
    for walk in walks(2, state.num_chunks, chunk_tokens):
        prefill.cache.tensor.fill_(torch.nan)
        again, their_logits = walked(prefill, batch, chunk_tokens, walk, other)
        assert torch.equal(their_logits, logits_TV)
        mine, theirs = (x[:, pool.wave(112).slices[0].block_table] for x in (keys, prefill.cache.tensor.nan_to_num()))
        assert torch.equal(mine, theirs), "the last block is the other wave's"
        assert torch.equal(again.expert_counts, state.expert_counts) and again.expert_bytes == state.expert_bytes


def test_deterministic_chunks_of_whole_blocks_are_the_whole(weights: GpuWeights) -> None:
    pool = Pool(block_tokens=64, num_blocks=4, is_deterministic=True)
    prefill, batch = pool.prefill(weights), pool.wave(150, 20)
    whole, logits_TV = walked(prefill, batch, None)
    state, their_logits = walked(prefill, batch, 64, layered(2, 3))
    assert state.num_chunks == 3 and torch.equal(their_logits, logits_TV)
    assert torch.equal(state.expert_counts, whole.expert_counts) and state.expert_bytes >= whole.expert_bytes


def test_a_chunk_without_the_keys_before_it_is_refused(weights: GpuWeights) -> None:
    pool = Pool()
    prefill = pool.prefill(weights)
    state = prefill.begin(pool.wave(20), 16)
    with pytest.raises(AssertionError, match="chunk 0 has not run layer 0"):
        prefill.run_layers(0, 1, state, (1, 2))
    prefill.run_layers(0, 2, state, (0, 1))
    with pytest.raises(AssertionError):
        prefill.logits(state, [3])
    with pytest.raises(AssertionError, match="keeps_routed"):
        _ = state.routed_ids


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_of_every_family_on_a_gpu(family: str) -> None:
    """Captured chunks of 512 under a prefix; launched ones of 2,048 and more, the first by cuDNN; prompts side by side."""
    weights = small_decoder(family, dtype=torch.bfloat16, device=DEVICE, sizes=WIDE).weights
    pool = Pool(num_blocks=64, block_tokens=64, captured=2048)
    prefill = pool.prefill(weights)
    for lengths, chunk_tokens in (((1500,), 512), ((1700, 33), 512), ((2000,), 1024), ((700, 900), 640)):
        state, logits_TV = walked(prefill, pool.wave(*lengths), chunk_tokens)
        assert_is_float64s(weights, state, logits_TV)
        assert_is_counted(weights, state)
        for walk in walks(3, state.num_chunks, chunk_tokens):
            assert torch.equal(walked(prefill, state.batch, chunk_tokens, walk)[1], logits_TV), (lengths, walk)
    prefill.captured = None
    for lengths, limit in (((2000,), None), ((2000,), 1024), ((1900, 100), 1500)):
        state, logits_TV = walked(prefill, pool.wave(*lengths), limit)
        assert_is_float64s(weights, state, logits_TV)
        for walk in walks(3, state.num_chunks, 2):
            assert torch.equal(walked(prefill, state.batch, limit, walk)[1], logits_TV), (lengths, walk)


@pytest.mark.gpu
def test_deterministic_chunks_on_a_gpu() -> None:
    """Captured, launched, whole, in chunks of whole blocks: the same bits."""
    weights = small_decoder("qwen3_moe", dtype=torch.bfloat16, device=DEVICE, sizes=WIDE).weights
    pool = Pool(num_blocks=64, block_tokens=64, captured=2048, is_deterministic=True)
    prefill, batch = pool.prefill(weights), pool.wave(2000, 40)
    _, logits_TV = walked(prefill, batch, None)
    for chunk_tokens in (512, 1024, 1984):
        assert torch.equal(walked(prefill, batch, chunk_tokens)[1], logits_TV), chunk_tokens
    prefill.captured = None
    assert torch.equal(walked(prefill, batch, 512, layered(3, 4))[1], logits_TV)


def tiny_greedy(prompt: list[int], num_tokens: int, chunk_tokens: int) -> list[int]:
    """Of the embedded model in float32: each token by one wave of all before it, in chunks."""
    weights = load_gpu_weights(TINY_MOE, device=DEVICE, dtype=torch.float32)
    cache = GpuKvCache(gpu_kv_spec(weights.config, dtype=torch.float32), 8, DEVICE)
    prefill, ids = GpuPrefill(GpuDecoder(weights), cache), list(prompt)
    for _ in range(num_tokens):
        batch = StepBatch(slices=(PromptSlice(token_ids=ids, start=0, block_table=range(8)),))
        ids = [*ids, int(prefill.run(batch, chunk_tokens)[1].argmax())]
    return ids[len(prompt) :]


def cpu_greedy(model: Model, prompt: list[int], num_tokens: int) -> list[int]:
    from tests.engine.test_gpu_prefill import cpu_greedy

    return cpu_greedy(model, [prompt], num_tokens)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("chunk_tokens", [16, 63, 256])
def test_chunked_tokens_of_the_embedded_model_equal_the_cpus(model: Model, chunk_tokens: int) -> None:
    """Without TF32. No token among these is nearer to another than 2e-4 of the logits' length, no expert than 3e-6 of probability: more
    than float32 rounds."""
    prompt = torch.randint(3, 8192, (257,), generator=torch.Generator().manual_seed(5)).tolist()
    assert tiny_greedy(prompt, 12, chunk_tokens) == cpu_greedy(model, prompt, 12)
