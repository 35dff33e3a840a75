"""Owns what decode attention of captured steps needs beside queries: how keys are cut, step by step, and room. Knows no layer's weights.

The cut is made once a step, on the device, and read by every layer. Each bucket has a plan of its own size; all share one workspace.

Legend: R rows of a bucket, W blocks of a table, H query heads, N kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from duomo.engine.gpu_kv_cache import GpuKvCache
from duomo.models.config import ModelConfig
from duomo.models.gpu_decoder import Attend
from duomo_kernels._decode_pieces import DecodePlan, DecodeShape, allocate_plan, decode_workspace
from duomo_kernels.decode_attention import decode_attention
from duomo_kernels.decode_plan import decode_plan

MIN_CHUNK_TOKENS = 256
MAX_CHUNKS = 32  # of the longest sequence: what pieces of a full batch take grows with them


def chunk_tokens(max_model_tokens: int) -> int:
    """Keys after which every sequence is cut where a row's bits may not depend on its company: a power of two."""
    chunk = MIN_CHUNK_TOKENS
    while chunk * MAX_CHUNKS < max_model_tokens:
        chunk *= 2
    return chunk


class GpuDecodeAttention:
    """Attention over a pool for steps of these buckets, the largest last. They share the workspace, so they follow each other."""

    def __init__(self, config: ModelConfig, cache: GpuKvCache, buckets: Sequence[int], table_width: int, *, is_deterministic: bool) -> None:
        self._cache = cache
        self._scale = config.head_dim**-0.5
        largest = DecodeShape(
            num_sequences=buckets[-1],
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_tokens=cache.spec.block_tokens,
            max_blocks=table_width,
            chunk_tokens=chunk_tokens(table_width * cache.spec.block_tokens) if is_deterministic else None,
        )
        self._plans = {bucket: allocate_plan(replace(largest, num_sequences=bucket), cache.device) for bucket in buckets}
        self._workspace = decode_workspace(largest, cache.device)

    def begin(self, bucket: int, table_RW: Tensor, length_R: Tensor) -> DecodePlan:
        """Launch the cut that all layers of a step share."""
        return decode_plan(length_R, table_RW, self._plans[bucket])

    def of_layer(self, layer_idx: int, plan: DecodePlan) -> Attend:
        """Attention over one layer's pool."""
        pool = self._cache.layer(layer_idx)

        def attend(q_RHD: Tensor, k_RND: Tensor | None, v_RND: Tensor | None) -> Tensor:
            # between the cut and any attention stand norms and products, which wait for it before they let a next kernel start
            return decode_attention(q_RHD, pool, plan, scale=self._scale, workspace=self._workspace, is_settled=True)

        return attend
