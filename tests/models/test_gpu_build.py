"""Every tensor is asked for once and written where it stays: a model of which two copies fit nowhere must not need two."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duomo.models.checkpoint import Entry, all_entries
from duomo.models.config import ModelConfig, load_config
from duomo.models.gpu_build import WeightTarget, build_weights
from duomo.models.gpu_weights import GpuWeights

PUBLISHED = Path(__file__).parent / "published"


class Recording:
    """A source that remembers where it was told to write."""

    def __init__(self, is_fp8: bool) -> None:
        self._is_fp8 = is_fp8
        self.asked: Counter[str] = Counter()
        self.written: list[Tensor] = []

    def fill(self, entry: Entry, out: Tensor) -> None:
        assert tuple(out.shape) == entry.shape and out.is_contiguous(), entry
        self._record(entry, out)

    def is_fp8(self, entry: Entry) -> bool:
        return self._is_fp8

    def fill_fp8(self, entry: Entry, out_NK: Tensor, scale_nk: Tensor) -> None:
        assert tuple(out_NK.shape) == entry.shape and out_NK.dtype is torch.float8_e4m3fn, entry
        assert tuple(scale_nk.shape) == tuple(-(-side // 128) for side in entry.shape) and scale_nk.dtype is torch.float32, entry
        self._record(entry, out_NK)
        self.written.append(scale_nk)

    def _record(self, entry: Entry, out: Tensor) -> None:
        self.asked[entry.name] += 1
        self.written.append(out)


def kept(weights: GpuWeights) -> list[Tensor]:
    found = [weights.embed_VD, weights.norm_D, weights.head_VD]
    for layer in weights.layers:
        found += [layer.input_norm_D, layer.post_norm_D, layer.qkv.weight_NK, layer.out.weight_NK]
        found += [layer.experts.gate_up_EFD, layer.experts.down_EDF]
        scales = (layer.qkv.scale_nk, layer.out.scale_nk, layer.experts.gate_up_scale_Efd, layer.experts.down_scale_Edf)
        found += [tensor for tensor in (*scales, layer.router_ED) if tensor is not None]
        found += [] if layer.qk_norm is None else [layer.qk_norm.q_weight, layer.qk_norm.k_weight]
    return found


def small(name: str, folder: Path) -> ModelConfig:
    (folder / "config.json").write_text((PUBLISHED / f"{name}.json").read_text())
    config = load_config(folder, needs_weights=False)
    return replace(config, num_layers=2, max_position_tokens=8)


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "olmoe-1b-7b-0924", "mixtral-8x7b-v0.1", "llama-3-8b", "qwen3-0.6b"])
def test_each_tensor_once_and_in_its_place(name: str, is_fp8: bool, tmp_path: Path) -> None:
    config, source = small(name, tmp_path), Recording(is_fp8)
    weights = build_weights(config, source, WeightTarget(device=torch.device("meta")))
    assert source.asked == Counter(entry.name for entry in all_entries(config))
    places = {id(tensor.untyped_storage()) for tensor in kept(weights)}
    assert {id(tensor.untyped_storage()) for tensor in source.written} <= places
    assert all(layer.qkv.is_fp8 is layer.out.is_fp8 is layer.experts.is_fp8 is is_fp8 for layer in weights.layers)
    if not is_fp8:  # nothing else is kept: the bytes of the parameters, twice where embeddings are tied
        assert sum(tensor.nbytes for tensor in kept(weights)) == 2 * (
            config.total_params + (config.vocab * config.hidden if config.ties_embeddings else 0)
        )


def test_quantising_asks_once_too(tmp_path: Path) -> None:
    config, source = small("mixtral-8x7b-v0.1", tmp_path), Recording(False)
    weights = build_weights(config, source, WeightTarget(device=torch.device("meta"), quantise="fp8"))
    assert source.asked == Counter(entry.name for entry in all_entries(config))
    assert all(layer.qkv.is_fp8 and layer.out.is_fp8 and layer.experts.is_fp8 for layer in weights.layers)
