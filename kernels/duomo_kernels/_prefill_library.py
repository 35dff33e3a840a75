"""Owns the call of cuDNN's attention over equally long sequences through torch. Knows nothing of prefixes or of when to call it.

Packed rows of S equal sequences are [S, heads, L, D] by strides alone, and cuDNN writes its result with the strides of q: nothing is copied
before or after. Offsets of ragged sequences are not used: torch's operator that takes them cannot be captured in a CUDA graph.

The first call with a shape builds cuDNN's plan (torch keeps it for the thread) and belongs before a capture, like the compilation of a
Triton kernel; later calls launch and never wait. torch's choice of backends is a process-wide switch, set for the length of the call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKEND = SDPBackend.CUDNN_ATTENTION
HEAD_DIMS = (64, 128)  # multiples of 8 up to 128 are allowed; these were measured or are in models that we serve


def takes(q_THD: Tensor) -> bool:
    """Whether cuDNN computes such heads on q's device."""
    is_half = q_THD.dtype in (torch.bfloat16, torch.float16)
    return q_THD.is_cuda and is_half and q_THD.shape[2] in HEAD_DIMS and torch.backends.cudnn.is_available()


def equal_attention(q_THD: Tensor, k_TND: Tensor, v_TND: Tensor, num_sequences: int, *, scale: float, out: Tensor | None = None) -> Tensor:
    """Causal attention of each of num_sequences equal sequences over itself: [T, H, D], contiguous."""
    q_SHLD, k_SNLD, v_SNLD = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q_THD, k_TND, v_TND))
    is_grouped = q_THD.shape[1] != k_TND.shape[1]
    with sdpa_kernel(BACKEND):
        out_SHLD = scaled_dot_product_attention(q_SHLD, k_SNLD, v_SNLD, is_causal=True, scale=scale, enable_gqa=is_grouped)
    out_THD = out_SHLD.transpose(1, 2).reshape(q_THD.shape).contiguous()
    return out_THD if out is None else out.copy_(out_THD)
