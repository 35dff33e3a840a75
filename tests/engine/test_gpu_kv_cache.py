"""The pool on a GPU: its layout and its copies."""

from __future__ import annotations

import pytest
import torch

from duomo.engine.gpu_kv_cache import GpuKvCache, gpu_kv_spec
from duomo.engine.kv_cache import KvSpec
from duomo.engine.memory_plan import GPU_BLOCK_TOKENS
from duomo.models.qwen3_moe import Model


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_layout(device: torch.device) -> None:
    cache = GpuKvCache(KvSpec(num_layers=3, num_kv_heads=2, head_dim=8, block_tokens=4, dtype=torch.bfloat16), 5, device)
    assert cache.tensor.shape == (3, 5, 2, 2, 4, 8) and cache.tensor.dtype == torch.bfloat16 and not cache.tensor.any()
    assert cache.layer(1).data_ptr() == cache.tensor[1].data_ptr() and cache.layer(1).is_contiguous()
    assert cache.layer(0)[0].nbytes == cache.spec.block_bytes and cache.device.type == device.type


def test_the_models_spec(model: Model) -> None:
    spec = gpu_kv_spec(model.config)
    assert (spec.block_tokens, spec.dtype, spec.num_layers) == (GPU_BLOCK_TOKENS, torch.bfloat16, 8)


def test_blocks_are_copied_in_all_layers(device: torch.device) -> None:
    cache = GpuKvCache(KvSpec(num_layers=2, num_kv_heads=1, head_dim=4, block_tokens=2), 6, device)
    cache.tensor.normal_()
    before = cache.tensor.clone()
    cache.copy_blocks([(4, 0), (4, 1), (2, 3)])
    assert torch.equal(cache.tensor, before[:, [4, 4, 2, 2, 4, 5]])
    cache.copy_blocks([])
    assert torch.equal(cache.tensor, before[:, [4, 4, 2, 2, 4, 5]])
