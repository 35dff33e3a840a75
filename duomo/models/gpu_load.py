"""Owns the way of a model folder onto a GPU. Knows what a folder holds, not how tensors are joined (gpu_build.py)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from duomo.models.checkpoint import Entry, all_entries
from duomo.models.config import Fp8Blocks, load_config
from duomo.models.gpu_build import HALVES, WeightTarget, build_weights
from duomo.models.gpu_weights import GpuWeights
from duomo.models.weights import WeightFolder
from duomo_kernels._weights import SCALE_BLOCK
from duomo_kernels.quant_fp8 import quant_fp8

log = logging.getLogger(__name__)


def load_gpu_weights(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    quantise: Literal["fp8"] | None = None,
    progress: bool = False,
    count: Callable[[int, int], None] | None = None,
) -> GpuWeights:
    """Load a Hugging Face folder of any supported family: safetensors in one or many files, bf16, f16, f32 or fp8 with block scales.

    Blocks of 128 x 128 stay fp8 where dtype is a half precision; other blocks, and all where dtype is float32, are dequantised.
    quantise="fp8" turns the experts' and the attention's products to fp8. Host memory holds one tensor at a time. Raises ModelError naming
    the file, tensor, shape or architecture at fault. progress shows a bar on stderr; count is told (tensors read, all).
    """
    target = WeightTarget(device=device, dtype=dtype, quantise=quantise)
    config = load_config(folder)
    blocks = None if config.quantisation is None else config.quantisation.block
    if dtype in HALVES and quantise is None and blocks not in (None, (SCALE_BLOCK, SCALE_BLOCK)):
        log.warning("%s: weights made %s, not kept in fp8: the kernels know blocks of 128 x 128, not %s", folder, dtype, blocks)
    num_tensors = sum(1 for _ in all_entries(config))
    with WeightFolder(folder, config.quantisation, num_tensors=num_tensors, progress=progress, count=count) as weights:
        return build_weights(config, _FolderSource(weights, config.quantisation), target)


class _FolderSource:
    """A WeightSource (gpu_build.py)."""

    def __init__(self, weights: WeightFolder, quantisation: Fp8Blocks | None) -> None:
        self._weights = weights
        self._block = None if quantisation is None else quantisation.block

    def fill(self, entry: Entry, out: Tensor) -> None:
        stored, scale = self._weights.take_stored(*entry)
        if scale is not None:
            assert self._block is not None
            stored = quant_fp8(stored.to(out.device), scale.to(out.device), self._block)
        elif stored.dtype != out.dtype:
            stored = stored.to(out.device)  # first moved, then rounded: a core of the host is the slower of the two
        out.copy_(stored)

    def is_fp8(self, entry: Entry) -> bool:
        return self._block == (SCALE_BLOCK, SCALE_BLOCK) and self._weights.is_fp8(entry.name)

    def fill_fp8(self, entry: Entry, out_NK: Tensor, scale_nk: Tensor) -> None:
        stored, scale = self._weights.take_stored(*entry)
        assert scale is not None, entry
        out_NK.copy_(stored)
        scale_nk.copy_(scale)
