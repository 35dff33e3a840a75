"""Owns a model of random weights: every tensor drawn from its name and a seed, on the device. Knows no file.

The definition is by checkpoint tensor: normal numbers of deviation std in float32, from torch's generator of the device seeded by a hash
of seed and name, rounded to the dtype; weights of norms are ones. Whoever asks for the same name, shape, seed and kind of device gets the
same numbers, so that a peer runs the same model without a file of it. A CPU and a GPU draw different numbers; GPUs of one kind equal ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from duomo.models.checkpoint import Entry, all_entries
from duomo.models.config import ModelConfig
from duomo.models.gpu_build import WeightTarget, build_weights
from duomo.models.gpu_weights import GpuWeights

NORM_SUFFIX = "norm.weight"  # of all families: input_layernorm, post_attention_layernorm, q_norm, k_norm, norm


def random_tensor(name: str, shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype, seed: int, std: float) -> Tensor:
    """The tensor that a checkpoint would hold under that Hugging Face name."""
    if name.endswith(NORM_SUFFIX):
        return torch.ones(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(seed_of(name, seed))
    return torch.empty(shape, dtype=torch.float32, device=device).normal_(0.0, std, generator=generator).to(dtype)


def seed_of(name: str, seed: int) -> int:
    """63 bits that differ between names and between seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big") >> 1


def random_gpu_weights(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    quantise: Literal["fp8"] | None = None,
    seed: int = 0,
    std: float = 0.02,
) -> GpuWeights:
    """The model of random_checkpoint. quantise="fp8": drawn in dtype, then turned to fp8; what the configuration says of its own
    checkpoint's quantisation does not count. Raises ModelError where dtype cannot stand beside fp8."""
    return build_weights(config, _DrawnSource(seed, std), WeightTarget(device=device, dtype=dtype, quantise=quantise))


def random_checkpoint(
    config: ModelConfig, *, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0, std: float = 0.02
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything that the checkpoint would hold, one at a time."""
    for name, shape in all_entries(config):
        yield name, random_tensor(name, shape, device=device, dtype=dtype, seed=seed, std=std)


class _DrawnSource:
    """A WeightSource (gpu_build.py)."""

    def __init__(self, seed: int, std: float) -> None:
        self._seed = seed
        self._std = std

    def fill(self, entry: Entry, out: Tensor) -> None:
        out.copy_(random_tensor(*entry, device=out.device, dtype=out.dtype, seed=self._seed, std=self._std))

    def is_fp8(self, entry: Entry) -> bool:
        return False

    def fill_fp8(self, entry: Entry, out_NK: Tensor, scale_nk: Tensor) -> None:
        raise AssertionError(f"{entry.name} is drawn, never held in fp8")
