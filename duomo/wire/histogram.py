"""Owns the packed form of an expert histogram: arrays of routed tokens to and from `ExpertHistogram`. Knows no model and no peer.

Names of shapes: L layers, E experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from duomo.errors import WireError
from duomo.wire.codec import BAD_FIELD
from duomo.wire.values import ExpertHistogram


def packed(counts_LE: ArrayLike) -> ExpertHistogram:
    """The array as it travels: int64 where it is int64, else int32."""
    array_LE = np.asarray(counts_LE)
    int_bytes = 8 if array_LE.dtype == np.int64 else 4
    num_layers, num_experts = array_LE.shape
    counts = np.ascontiguousarray(array_LE, f"<i{int_bytes}").tobytes()
    return ExpertHistogram(num_layers=num_layers, num_experts=num_experts, counts=counts, int_bytes=8 if int_bytes == 8 else 4)


def unpacked(histogram: ExpertHistogram) -> NDArray[np.int32] | NDArray[np.int64]:
    """[L, E] over the message's own bytes: read-only. Raises WireError where they are not what its sizes say, or negative."""
    num_layers, num_experts = histogram.num_layers, histogram.num_experts
    needed = num_layers * num_experts * histogram.int_bytes
    if num_layers < 1 or num_experts < 1 or len(histogram.counts) != needed:
        raise WireError(
            f"an expert histogram of {num_layers} layers and {num_experts} experts by {histogram.int_bytes} bytes has {needed} bytes, "
            f"not {len(histogram.counts)}",
            code=BAD_FIELD,
        )
    counts: NDArray[np.int32] | NDArray[np.int64] = np.frombuffer(histogram.counts, f"<i{histogram.int_bytes}")
    if counts.min() < 0:
        raise WireError("an expert histogram counts fewer than no tokens", code=BAD_FIELD)
    return counts.reshape(num_layers, num_experts)
