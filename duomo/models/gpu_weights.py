"""Owns the tensors of a model on one GPU, as the kernels read them. Knows no file format, no forward pass and no sequences.

Every product is y = x @ weight.T: the summed axis lies last, so that rows of contiguous weights stream. In fp8 a block of 128 x 128 weights
(edges may be shorter) has a float32 scale; embeddings, norms, the router and the output head stay in the model's half precision.

A dense decoder is one expert that every token takes with weight 1: num_experts 1, top_k 1, router_ED None.

Legend: D model, V vocabulary, H query heads, N kv heads, Dh head dim, E experts, F expert hidden, P = (H + 2N) * Dh.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duomo.models.config import ModelConfig
from duomo_kernels._weights import ExpertWeights
from duomo_kernels.qk_rope_write import QkNorm, RopeTables


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearWeights:
    """weight_NK [N, K] bf16 (float16 and float32 in tests), or float8_e4m3fn with scale_nk float32 [ceil(N / 128), ceil(K / 128)]."""

    weight_NK: Tensor
    scale_nk: Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.weight_NK.dtype == torch.float8_e4m3fn

    @property
    def num_bytes(self) -> int:
        return self.weight_NK.nbytes + (0 if self.scale_nk is None else self.scale_nk.nbytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuLayer:
    """One decoder layer. qkv: rows of q, then k, then v; norms [D] in the weights' dtype; router_ED in the model's half precision."""

    input_norm_D: Tensor
    qkv: LinearWeights
    qk_norm: QkNorm | None
    out: LinearWeights
    post_norm_D: Tensor
    router_ED: Tensor | None
    experts: ExpertWeights

    @property
    def expert_bytes(self) -> int:
        """Of one expert, scales and all."""
        held = self.experts
        parts = (held.gate_up_EFD, held.down_EDF, held.gate_up_scale_Efd, held.down_scale_Edf)
        return sum(part.nbytes for part in parts if part is not None) // held.num_experts

    @property
    def kind(self) -> tuple[bool, ...]:
        """What decides which kernels the layer is computed by: layers of one kind are compiled once."""
        return (self.qkv.is_fp8, self.out.is_fp8, self.experts.is_fp8, self.qk_norm is None, self.router_ED is None)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuWeights:
    """A whole model. head_VD may be embed_VD itself (tied)."""

    config: ModelConfig
    embed_VD: Tensor
    layers: tuple[GpuLayer, ...]
    norm_D: Tensor
    head_VD: Tensor
    rope: RopeTables

    @property
    def first_of_kinds(self) -> tuple[int, ...]:
        """A layer of each kind, the first: what is run to have the kernels of all. Checkpoints may keep some layers wide."""
        kinds = [layer.kind for layer in self.layers]
        return tuple(kinds.index(kind) for kind in dict.fromkeys(kinds))

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, embeddings and norms."""
        return self.embed_VD.dtype

    @property
    def device(self) -> torch.device:
        return self.embed_VD.device
