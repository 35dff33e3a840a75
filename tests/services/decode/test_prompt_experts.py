"""A prompt's histogram on decode: both wire versions' forms, none at all, and another model's."""

from __future__ import annotations

import numpy as np
import pytest

from duomo.errors import TransferError
from duomo.wire.codec import decode, encode
from duomo.wire.histogram import packed
from duomo.wire.messages import ExpertHistogram, PrefillDone
from services.decode.prompt_experts import prompt_counts
from tests.wire.prefill_done import prefill_done


def arrived(message: PrefillDone, version: int) -> PrefillDone:
    read = decode(encode(message, version=version)[4:])
    assert isinstance(read, PrefillDone)
    return read


def test_both_versions_of_a_prefill_replica_are_understood() -> None:
    counts_LE = np.array([[1, 0, 2], [0, 3, 0]], np.int32)
    newer = prompt_counts(arrived(prefill_done(packed(counts_LE)), 3), 2, 3)
    older = prompt_counts(arrived(prefill_done(rows=((1, 0, 2), (0, 3, 0))), 2), 2, 3)
    assert newer is not None and older is not None
    assert np.array_equal(newer, counts_LE) and np.array_equal(older, counts_LE)


def test_an_older_decode_replica_hears_nothing_of_it() -> None:
    assert prompt_counts(arrived(prefill_done(packed(np.ones((2, 3), np.int32))), 2), 2, 3) is None


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (prefill_done(packed(np.ones((2, 4), np.int32))), "2 x 4, this model has 2 layers of 3 experts"),
        (prefill_done(rows=((1, 2, 3),)), "1 x 3"),
        (prefill_done(rows=((1, 2, 3), (1, 2))), "different lengths"),
        (prefill_done(rows=((1, 2, 3), (1, 2, 2**63))), "a count that no token makes"),
        (prefill_done(rows=((1, 2, 3), (1, 2, -1))), "fewer than no tokens"),
        (prefill_done(ExpertHistogram(num_layers=2, num_experts=3, counts=bytes(23))), "24 bytes, not 23"),
    ],
)
def test_another_models_histogram_is_refused_in_words(message: PrefillDone, words: str) -> None:
    with pytest.raises(TransferError, match=words) as refusal:
        prompt_counts(message, 2, 3)
    assert refusal.value.code == "kv_mismatch"
