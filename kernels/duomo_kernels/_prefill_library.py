"""Owns the call of cuDNN's attention over packed sequences through torch. Knows nothing of prefixes or of when to call it.

torch.nn.functional.scaled_dot_product_attention takes no packed lengths for dense tensors; the operator beneath its nested tensors does
(ragged offsets of cuDNN's graph API): q [T, H, D], k and v [T, N, D], cumulative lengths in int32 on the device, a bound of the longest
on the host. Causal means the upper left corner, so that queries and keys must be the same rows: no cached prefix.

cuDNN builds a plan for each (T, bound, heads): tens of milliseconds at first sight of a shape, so that only bucketed shapes suit it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cudnn_attention(
    q_THD: Tensor, k_TND: Tensor, v_TND: Tensor, cu_seqlens_S1: Tensor, max_tokens: int, *, scale: float, out: Tensor | None = None
) -> Tensor:
    """Causal attention of each packed sequence over itself: [T, H, D]. Rows past the last sequence are not written."""
    outputs = torch.ops.aten._cudnn_attention_forward(
        *(q_THD, k_TND, v_TND, None, cu_seqlens_S1, cu_seqlens_S1, max_tokens, max_tokens),
        False,  # no log-sum-exp
        0.0,  # no dropout
        True,  # causal
        False,  # no debug mask
        scale=scale,
    )
    result: Tensor = outputs[0]
    return result if out is None else out.copy_(result)
