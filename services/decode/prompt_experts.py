"""Owns what decode believes of a prompt's expert histogram, checked against the model. Knows no leg."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from duomo.errors import TransferError, WireError
from duomo.wire.histogram import unpacked
from duomo.wire.messages import PrefillDone


def prompt_counts(done: PrefillDone, num_layers: int, num_experts: int) -> NDArray[np.integer] | None:
    """Tokens of the prompt routed to each expert, [layers, experts], read-only; None where its prefill sent none.

    Raises TransferError (kv_mismatch) for another model's sizes: what came with such a histogram is not this model's either.
    """
    if done.expert_histogram is None:
        return None
    try:
        counts_LE = unpacked(done.expert_histogram)
    except WireError as error:
        raise TransferError(f"prefill sends an expert histogram that cannot be read: {error.detail}", code="kv_mismatch") from error
    if counts_LE.shape != (num_layers, num_experts):
        raise TransferError(
            f"prefill sends an expert histogram of {' x '.join(map(str, counts_LE.shape))}, "
            f"this model has {num_layers} layers of {num_experts} experts",
            code="kv_mismatch",
        )
    return counts_LE
