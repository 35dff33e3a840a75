"""Messages cover every block of every layer once, in order, within a slot; trailers and notifications are read as written."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duomo.errors import ConfigError
from services.kv_transfer import layout


@given(
    first_block=st.integers(0, 9),
    num_blocks=st.integers(0, 70),
    group_sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    block_bytes=st.integers(1, 5000),
    slack_bytes=st.integers(0, 40_000),
)
def test_messages_cover_each_block_of_each_layer_once(
    first_block: int, num_blocks: int, group_sizes: list[int], block_bytes: int, slack_bytes: int
) -> None:
    bounds = [sum(group_sizes[:g]) for g in range(len(group_sizes) + 1)]
    slot_bytes = block_bytes + slack_bytes
    blocks = range(first_block, first_block + num_blocks)
    spans = layout.messages(blocks, bounds, block_bytes, slot_bytes)
    covered = [(layer, block) for span in spans for layer in span.layers for block in range(span.block_lo, span.block_hi)]
    assert sorted(covered) == [(layer, block) for layer in range(bounds[-1]) for block in blocks]
    assert [span.message_idx for span in spans] == list(range(len(spans)))
    assert [span.group for span in spans] == sorted(span.group for span in spans)
    for span in spans:
        assert 0 < span.num_bytes <= slot_bytes
        assert span.num_bytes == len(span.layers) * (span.block_hi - span.block_lo) * block_bytes
        assert bounds[span.group] <= span.layers.start and span.layers.stop <= bounds[span.group + 1]


def test_heads_go_into_every_span_and_change_nothing_else() -> None:
    whole = layout.messages(range(3, 8), (0, 2, 4), 100, 450)
    sliced = layout.messages(range(3, 8), (0, 2, 4), 100, 450, heads=range(1, 3))
    assert {span.heads for span in whole} == {None} and {span.heads for span in sliced} == {range(1, 3)}
    assert tuple(replace(span, heads=None) for span in sliced) == whole
    assert [layout.trailer_start(7, span) for span in sliced] == [layout.trailer_start(7, span) for span in whole]


def test_a_group_is_cut_by_blocks_before_it_is_cut_by_layers() -> None:
    spans = layout.messages(range(3, 8), (0, 2, 4), 100, 450)
    assert [(s.group, s.layers, s.block_lo, s.block_hi) for s in spans] == [
        (0, range(0, 2), 3, 5),
        (0, range(0, 2), 5, 7),
        (0, range(0, 2), 7, 8),
        (1, range(2, 4), 3, 5),
        (1, range(2, 4), 5, 7),
        (1, range(2, 4), 7, 8),
    ]
    assert [s.layers for s in layout.messages(range(1), (0, 3), 100, 250)] == [range(0, 2), range(2, 3)]


def test_a_block_that_fits_no_slot_names_the_option() -> None:
    with pytest.raises(ConfigError, match="kv_transfer.slot_bytes"):
        layout.messages(range(1), (0, 1), 4097, 4096)


def test_trailer_lies_behind_the_payload_within_the_slot() -> None:
    for num_bytes in (1, 63, 64, 65, 257, 4096):
        assert layout.trailer_offset(num_bytes) >= num_bytes and layout.trailer_offset(num_bytes) % 64 == 0
        assert layout.message_bytes(num_bytes) <= layout.slot_stride(num_bytes)


def test_trailer_is_read_as_written() -> None:
    (span,) = layout.messages(range(2), (0, 1), 33, 66)
    place = memoryview(bytearray(b"\xff" * 64))
    start = layout.trailer_start(2**63 + 5, span)
    layout.write_trailer(place, start, 2**64 - 3)
    assert bytes(place[: len(start)]) == start and layout.read_hash(place) == 2**64 - 3 and bytes(place[40:]) == bytes(24)
    assert start != layout.trailer_start(2**63 + 6, span)


def test_notification_is_read_as_written_and_others_are_none() -> None:
    assert layout.read_notification(layout.notification(2**64 - 1, 2**32 - 1)) == (2**64 - 1, 2**32 - 1)
    assert layout.read_notification(b"hello") is None
