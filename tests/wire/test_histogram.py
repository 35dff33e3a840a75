"""Expert histograms: what was counted is what arrives, whatever the array's layout, and nothing else is believed."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from duomo.errors import WireError
from duomo.wire.codec import decode, encode
from duomo.wire.histogram import packed, unpacked
from duomo.wire.messages import PrefillDone
from duomo.wire.values import ExpertHistogram
from tests.wire.prefill_done import prefill_done


def counted(num_layers: int, num_experts: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 2**31 - 1, (num_layers, num_experts)).astype(np.int32)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 63), (48, 128)])
def test_an_array_arrives_as_it_was_counted(sizes: tuple[int, int]) -> None:
    for counts_LE in (counted(*sizes), np.asfortranarray(counted(*sizes)), counted(*sizes).astype(">i4"), counted(*sizes).tolist()):
        histogram = packed(np.asarray(counts_LE, np.int32) if isinstance(counts_LE, list) else counts_LE)
        assert (histogram.int_bytes, len(histogram.counts)) == (4, sizes[0] * sizes[1] * 4)
        assert np.array_equal(unpacked(histogram), np.asarray(counts_LE))
    totals_LE = counted(*sizes).astype(np.int64) * 2**20
    assert packed(totals_LE).int_bytes == 8 and np.array_equal(unpacked(packed(totals_LE)), totals_LE)


def test_a_layer_lies_before_the_next_and_low_bytes_first() -> None:
    assert packed(np.array([[1, 258], [3, 4]], np.int32)).counts == bytes((1, 0, 0, 0, 2, 1, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0))


@pytest.mark.parametrize(
    ("histogram", "words"),
    [
        (ExpertHistogram(num_layers=2, num_experts=2, counts=bytes(15)), "16 bytes, not 15"),
        (ExpertHistogram(num_layers=2, num_experts=2, counts=bytes(16), int_bytes=8), "32 bytes, not 16"),
        (ExpertHistogram(num_layers=0, num_experts=2, counts=b""), "0 layers"),
        (ExpertHistogram(num_layers=-1, num_experts=-1, counts=bytes(4)), "-1 layers"),
        (ExpertHistogram(num_layers=1, num_experts=1, counts=bytes((255,) * 4)), "fewer than no tokens"),
    ],
)
def test_bytes_that_are_not_what_their_sizes_say_are_refused(histogram: ExpertHistogram, words: str) -> None:
    with pytest.raises(WireError, match=words) as refusal:
        unpacked(histogram)
    assert refusal.value.code == "bad_field"


def test_other_widths_do_not_pass_the_decoder() -> None:
    payload = msgspec.msgpack.encode(msgspec.to_builtins(prefill_done(packed(np.array([[1]], np.int32))), builtin_types=(bytes,)))
    assert isinstance(decode(payload), PrefillDone)
    with pytest.raises(WireError, match="bad_field"):
        decode(payload.replace(b"\xa9int_bytes\x04", b"\xa9int_bytes\x02"))


def test_what_a_frame_brought_is_read_without_a_copy() -> None:
    message = decode(encode(prefill_done(packed(counted(48, 128))))[4:])
    assert isinstance(message, PrefillDone) and message.expert_histogram is not None
    counts_LE = unpacked(message.expert_histogram)
    assert not counts_LE.flags.owndata and not counts_LE.flags.writeable
