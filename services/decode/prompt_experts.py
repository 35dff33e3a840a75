"""Owns what decode believes of a prompt's expert histogram, as version 3 or 2 brings it, checked against the model. Knows no leg."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from duomo.errors import TransferError, WireError
from duomo.wire.histogram import packed, unpacked
from duomo.wire.messages import PrefillDone


def prompt_counts(done: PrefillDone, num_layers: int, num_experts: int) -> NDArray[np.integer] | None:
    """Tokens of the prompt routed to each expert, [layers, experts], read-only; None where its prefill sent none.

    Raises TransferError (kv_mismatch) for another model's sizes: what came with such a histogram is not this model's either.
    """
    try:
        counts_LE = _counts(done)
    except (WireError, ValueError, OverflowError) as error:
        detail = error.detail if isinstance(error, WireError) else f"rows of different lengths, or a count that no token makes ({error})"
        raise TransferError(f"prefill sends an expert histogram that cannot be read: {detail}", code="kv_mismatch") from error
    if counts_LE is not None and counts_LE.shape != (num_layers, num_experts):
        raise TransferError(
            f"prefill sends an expert histogram of {' x '.join(map(str, counts_LE.shape))}, "
            f"this model has {num_layers} layers of {num_experts} experts",
            code="kv_mismatch",
        )
    return counts_LE


def _counts(done: PrefillDone) -> NDArray[np.integer] | None:
    if done.expert_histogram is not None:
        return unpacked(done.expert_histogram)
    return unpacked(packed(np.asarray(done.expert_counts, np.int64))) if done.expert_counts else None
