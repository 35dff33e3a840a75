"""A decoder of two small layers with random weights, and a pool for it: what tests of a GPU's engine run, in Triton's interpreter too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from duomo.engine.batch import PromptSlice, StepBatch
from duomo.engine.decode_step import Joining
from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.gpu_prefill import GpuPrefill
from duomo.engine.sampler import RowSampling
from duomo.models.config import ModelConfig
from duomo.models.gpu_decoder import GpuDecoder
from duomo.models.gpu_random import random_gpu_weights
from duomo.wire.values import Sampling
from duomo_kernels._bounds import bound

TINY = ModelConfig(
    architecture="Qwen3MoeForCausalLM",
    num_layers=2,
    hidden=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    num_experts=4,
    top_k=2,
    expert_hidden=32,
    vocab=97,
    max_position_tokens=512,
    norm_eps=1e-6,
    rope_theta=1e4,
    normalises_topk=True,
    ties_embeddings=False,
    eos_ids=(2,),
    quantisation=None,
    fingerprint="tiny",
    qk_norm="head",
    has_router=True,
)
# Kernels of a GPU want tiles of what a model has; wide enough for tensor cores.
WIDE = replace(TINY, hidden=512, num_heads=8, num_kv_heads=4, head_dim=64, num_experts=16, top_k=4, expert_hidden=256, vocab=1000)
# Every expert takes every token: where bf16 sums in another order, no token goes elsewhere.
UNROUTED = replace(WIDE, num_experts=4)
GREEDY = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class TinyEngine:
    """Decoder and pool, and a prefill over them."""

    decoder: GpuDecoder
    cache: GpuKvCache

    @property
    def prefill(self) -> GpuPrefill:
        return GpuPrefill(self.decoder, self.cache)

    def judge_greedy(self, ids: Sequence[int], tokens: Sequence[int], table: Sequence[int]) -> NDArray[np.int32]:
        """Hold tokens after ids against one prefill of both, into the table's blocks. Returns the routed ids [L, T, K] of all but the last.

        Prefill sums in another order: a token may differ from its best where their logits are as near as both may be wrong (four times the
        bound of a decoder's logits, of which one logit is one term among equals): in float32 that is nearly never, in bf16 sometimes.
        """
        prefill, whole = self.prefill, (*ids, *tokens[:-1])
        state = prefill.begin(StepBatch(slices=(PromptSlice(token_ids=whole, start=0, block_table=table),)), keeps_routed=True)
        prefill.run_layers(0, self.decoder.config.num_layers, state)
        logits_TV = prefill.logits(state, list(range(len(ids) - 1, len(whole))))
        chosen_T = logits_TV.gather(1, torch.tensor(tokens, device=logits_TV.device)[:, None])[:, 0]
        behind_T = (logits_TV.amax(-1) - chosen_T) / logits_TV.square().mean(-1).sqrt()
        num_blocks = 2 * self.decoder.config.num_layers + 1  # each rounds by itself: tests/models/small_decoders.py derives the bound
        slack = 4 * bound(self.decoder.weights.dtype) * num_blocks**0.5
        assert float(behind_T.max()) <= slack, (tokens, logits_TV.argmax(-1).tolist(), behind_T.tolist())
        return torch.stack(state.routed_ids).cpu().numpy()


def tiny_engine(device: torch.device, *, num_blocks: int = 32, block_tokens: int = 16, is_deterministic: bool = False) -> TinyEngine:
    """On a GPU a wider one in bf16; elsewhere float32, which the interpreter multiplies right."""
    return engine_of(WIDE if device.type == "cuda" else TINY, device, num_blocks, block_tokens, is_deterministic=is_deterministic)


def engine_of(
    config: ModelConfig, device: torch.device, num_blocks: int, block_tokens: int, *, is_deterministic: bool = False
) -> TinyEngine:
    """Weights spread as 1 / sqrt(summed axis): logits and scores of about one."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = random_gpu_weights(config, device=device, dtype=dtype, std=config.hidden**-0.5)
    cache = GpuKvCache(gpu_kv_spec(config, block_tokens=block_tokens, dtype=dtype), num_blocks, device)
    return TinyEngine(GpuDecoder(weights, is_deterministic=is_deterministic), cache)


def joining(ids: Sequence[int], token_id: int, sampling: Sampling = GREEDY, output_ids: Sequence[int] = ()) -> Joining:
    """A sequence with this prompt whose token_id is fed first."""
    row = RowSampling(sampling=sampling, choice=0, prompt_ids=ids, output_ids=(*output_ids, token_id), ending_ids=TINY.eos_ids)
    return Joining(token_id=token_id, sampling=row)
