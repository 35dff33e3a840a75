"""A prompt's histogram on decode: as it travels, none at all, and another model's."""

from __future__ import annotations

import numpy as np
import pytest

from duomo.errors import TransferError
from duomo.wire.codec import decode, encode
from duomo.wire.histogram import packed
from duomo.wire.messages import PrefillDone
from duomo.wire.values import ExpertHistogram
from services.decode.prompt_experts import prompt_counts
from tests.wire.prefill_done import prefill_done


def test_a_histogram_arrives_as_it_was_counted() -> None:
    counts_LE = np.array([[1, 0, 2], [0, 3, 0]], np.int32)
    read = decode(encode(prefill_done(packed(counts_LE)))[4:])
    assert isinstance(read, PrefillDone)
    counted = prompt_counts(read, 2, 3)
    assert counted is not None and np.array_equal(counted, counts_LE)


def test_a_prompt_without_one_counts_nothing() -> None:
    assert prompt_counts(prefill_done(), 2, 3) is None


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (prefill_done(packed(np.ones((2, 4), np.int32))), "2 x 4, this model has 2 layers of 3 experts"),
        (prefill_done(packed(np.array([[1, 2, 3], [1, 2, -1]], np.int32))), "fewer than no tokens"),
        (prefill_done(ExpertHistogram(num_layers=2, num_experts=3, counts=bytes(23))), "24 bytes, not 23"),
    ],
)
def test_another_models_histogram_is_refused_in_words(message: PrefillDone, words: str) -> None:
    with pytest.raises(TransferError, match=words) as refusal:
        prompt_counts(message, 2, 3)
    assert refusal.value.code == "kv_mismatch"
