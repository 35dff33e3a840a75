"""Owns RMS normalisation and rotary positions. Knows nothing of layers or caches.

    rms_norm:  y = x / sqrt(mean(x^2) + eps) * weight, over the last axis (Zhang and Sennrich 2019)
    rope:      (x1, x2) halves of a head: y = x * cos + (-x2, x1) * sin, cos and sin of position * theta^(-2i/D) (Su et al. 2021; halves as
               Hugging Face stores them)

Legend: T tokens, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, in float64."""
    wide = x.double()
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.double()).to(x.dtype)


@dataclass(frozen=True, slots=True)
class RmsWeight:
    """A norm's weight times sqrt(D), and D * eps as a tensor: x / sqrt(sum(x^2) + D * eps) needs no division by D (a third of the time)."""

    scaled: Tensor
    eps: Tensor


def rms_weight(weight: Tensor, eps: float) -> RmsWeight:
    """weight [..., D], broadcast from the right; one for each head is [H, D]. Exact where D is a power of four, else one more rounding."""
    dim = weight.shape[-1]
    return RmsWeight(weight * dim**0.5, torch.tensor(dim * eps))


def rms_norm(x: Tensor, weight: RmsWeight) -> Tensor:
    """x [..., D] normalised over D, times the weight."""
    scale = (x * x).sum(-1, keepdim=True).add_(weight.eps).rsqrt_()
    return x.mul(scale).mul_(weight.scaled)


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/D) [D / 2] in float32: the angle by which a position turns each pair."""
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def rope_tables(num_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos [P, D] and sin [P, D] in float32; the first half of sin is negated, so that rope needs no other sign."""
    return rope_tables_of(num_positions, rope_frequencies(head_dim, theta))


def rope_tables_of(num_positions: int, frequency_C: Tensor) -> tuple[Tensor, Tensor]:
    """The same for frequencies [C = D / 2] of any kind."""
    angle_PD = torch.arange(num_positions).float()[:, None] * frequency_C[None]
    sin_PD = angle_PD.sin()
    return torch.cat((angle_PD.cos(),) * 2, -1), torch.cat((-sin_PD, sin_PD), -1)


def rope_reference(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The formula, half by half (sin as rope_tables makes it)."""
    half = x_THD.shape[-1] // 2
    low, high = x_THD[..., :half], x_THD[..., half:]
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


def rope(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotate every head of every token: three products and sums, each rounded once, in the same order for every token."""
    turned = x_THD.roll(x_THD.shape[-1] // 2, -1).mul_(sin_T1D)
    return x_THD.mul(cos_T1D).add_(turned)
