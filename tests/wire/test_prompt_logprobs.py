"""A prompt's log-probabilities: what was computed is what arrives, and nothing else is believed."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from duomo.errors import WireError
from duomo.wire.codec import decode, encode
from duomo.wire.messages import PromptScored
from duomo.wire.prompt_logprobs import PromptScores, packed, unpacked
from duomo.wire.values import PromptLogprobs


def scored(num_tokens: int, num_top: int, dtype: type = np.float64, first: int = 1) -> PromptScores:
    rng = np.random.default_rng(num_tokens + num_top)
    return PromptScores(
        first=first,
        own_T=-rng.random(num_tokens).astype(dtype),
        rank_T=rng.integers(1, 1 << 31, num_tokens, dtype=np.int32),
        top_TK=np.asfortranarray(-rng.random((num_tokens, num_top)).astype(dtype)),
        top_ids_TK=rng.integers(0, 1 << 31, (num_tokens, num_top), dtype=np.int32),
    )


def same(one: PromptScores, other: PromptScores) -> bool:
    arrays = ((one.own_T, other.own_T), (one.rank_T, other.rank_T), (one.top_TK, other.top_TK), (one.top_ids_TK, other.top_ids_TK))
    return one.first == other.first and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("num_tokens", "num_top"), [(1, 0), (63, 1), (257, 20)])
def test_arrays_arrive_as_they_were_computed(dtype: type, num_tokens: int, num_top: int) -> None:
    scores = scored(num_tokens, num_top, dtype, first=129)
    message = PromptScored(request_id="r", attempt=0, traceparent="", remaining_s=1.0, scores=packed(scores))
    frame = encode(message)
    assert len(frame) < num_tokens * (1 + num_top) * (np.dtype(dtype).itemsize + 4) + 250, "numbers travel as bytes"
    found = decode(frame[4:])
    assert isinstance(found, PromptScored) and same(unpacked(found.scores), scores)


def test_its_own_stands_before_the_likeliest_and_low_bytes_come_first() -> None:
    scores = PromptScores(
        first=1,
        own_T=np.array([-1.0, -2.0], np.float32),
        rank_T=np.array([258, 1], np.int32),
        top_TK=np.array([[-0.5], [-2.0]], np.float32),
        top_ids_TK=np.array([[7], [8]], np.int32),
    )
    message = packed(scores)
    assert message.logprobs == np.array([-1.0, -0.5, -2.0, -2.0], "<f4").tobytes() and message.float_bytes == 4
    assert message.ranks == bytes((2, 1, 0, 0, 1, 0, 0, 0)) and message.top_ids == bytes((7, 0, 0, 0, 8, 0, 0, 0))


GOOD = packed(scored(2, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"logprobs": bytes(31)}, "logprobs of 2 prompt tokens, 1 listed, has 32 bytes, not 31"),
        ({"float_bytes": 4}, "has 16 bytes, not 32"),
        ({"top_ids": bytes(12)}, "top_ids .* 8 bytes, not 12"),
        ({"ranks": b""}, "ranks .* 8 bytes, not 0"),
        ({"first": 0}, "2 prompt tokens from 0 on"),
        ({"num_tokens": 0}, "0 prompt tokens"),
        ({"num_top": -1}, "-1 listed"),
        ({"ranks": bytes(8)}, "a rank below 1"),
        ({"top_ids": bytes((255,) * 8)}, "a token id below 0"),
        ({"logprobs": np.array([-1, np.nan, -1, -1], "<f8").tobytes()}, "no number"),
    ],
)
def test_bytes_that_are_not_what_their_sizes_say_are_refused(changes: dict[str, object], words: str) -> None:
    wrong: PromptLogprobs = msgspec.structs.replace(GOOD, **changes)
    with pytest.raises(WireError, match=words) as refusal:
        unpacked(wrong)
    assert refusal.value.code == "bad_field"
