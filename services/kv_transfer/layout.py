"""Owns where bytes lie: messages of a handle, slots of a ring, the trailer behind a payload. PURE; knows no memory and no transport.

ring     [slot 0][slot 1]...                       slot stride = slot_bytes + TRAILER_BYTES, slots start 64-byte aligned
slot     [payload, at most slot_bytes][trailer]    the trailer follows the payload, rounded up to 64 bytes
payload  [layer][block][k, v][kv head][block token][head dim], or these rows in fp8 (duomo/engine/kv_messages.py)
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from duomo.errors import ConfigError

TRAILER_BYTES = 64
ALIGNMENT_BYTES = 64
_MAGIC = 0x5245_4C49_4152_5444  # "DTRAILER"
_EXPECTED = struct.Struct("<QQQII")
_HASH = struct.Struct("<Q")
_NOTIFICATION = struct.Struct("<QI")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageSpan:
    """What one message of a handle carries: layers [layers.start, layers.stop) of blocks [block_lo, block_hi).

    block_lo and block_hi count in the prompt's block table; the payload has num_bytes bytes. heads: which of this rank's kv heads
    (head_slices.py); None: all of them, blocks whole.
    """

    message_idx: int
    group: int
    layers: range
    block_lo: int
    block_hi: int
    num_bytes: int
    heads: range | None = None


def trailer_start(handle_id: int, span: MessageSpan) -> bytes:
    """The first 32 bytes of a message's trailer: magic, handle, length, message index, group. The consumer knows them in advance."""
    return _EXPECTED.pack(_MAGIC, handle_id, span.num_bytes, span.message_idx, span.group)


def write_trailer(place: memoryview, start: bytes, digest: int) -> None:
    """Write trailer_start() and the hash into the first bytes of `place` (TRAILER_BYTES long, the rest is zero)."""
    place[: len(start)] = start
    _HASH.pack_into(place, len(start), digest)
    place[len(start) + _HASH.size : TRAILER_BYTES] = bytes(TRAILER_BYTES - len(start) - _HASH.size)


def read_hash(place: memoryview) -> int:
    """The hash in the trailer at `place`, once its start is what is expected."""
    digest: int = _HASH.unpack_from(place, _EXPECTED.size)[0]
    return digest


def messages(
    handle_blocks: range, group_bounds: Sequence[int], block_bytes: int, slot_bytes: int, heads: range | None = None
) -> tuple[MessageSpan, ...]:
    """Cut a handle into messages, in the order in which they are sent; both sides compute this alone and get the same, but for `heads`.

    handle_blocks: range(handle.first_block, handle.num_blocks), the blocks to send. group_bounds: layers [b[g], b[g+1]) form
    group g. block_bytes: k and v of one block in one layer, of the heads that are sent. slot_bytes: the most payload bytes of a message.
    heads: goes into every span, in the caller's own count where a pair of ranks sends some of their heads. A group is cut by
    runs of blocks; only where one block of all its layers exceeds a slot is it cut by layers too. Raises ConfigError where not
    even one block of one layer fits.
    """
    assert block_bytes > 0 and len(group_bounds) >= 2 and list(group_bounds) == sorted(group_bounds), (block_bytes, group_bounds)
    if block_bytes > slot_bytes:
        raise ConfigError(
            f"kv_transfer.slot_bytes is {slot_bytes}, but one block of one layer has {block_bytes} bytes: raise slot_bytes to at least that"
        )
    spans: list[MessageSpan] = []
    for group, (lo, hi) in enumerate(zip(group_bounds, group_bounds[1:], strict=False)):
        layers_per_message = min(hi - lo, slot_bytes // block_bytes)
        for layer_lo in range(lo, hi, max(1, layers_per_message)):
            layers = range(layer_lo, min(hi, layer_lo + layers_per_message))
            blocks_per_message = slot_bytes // (block_bytes * len(layers))
            for block_lo in range(handle_blocks.start, handle_blocks.stop, blocks_per_message):
                block_hi = min(handle_blocks.stop, block_lo + blocks_per_message)
                spans.append(
                    MessageSpan(
                        message_idx=len(spans),
                        group=group,
                        layers=layers,
                        block_lo=block_lo,
                        block_hi=block_hi,
                        num_bytes=(block_hi - block_lo) * len(layers) * block_bytes,
                        heads=heads,
                    )
                )
    return tuple(spans)


def trailer_offset(num_bytes: int) -> int:
    """Where the trailer of a payload of num_bytes starts within its slot."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def message_bytes(num_bytes: int) -> int:
    """Bytes written for a payload of num_bytes: payload, padding, trailer."""
    return trailer_offset(num_bytes) + TRAILER_BYTES


def slot_stride(slot_bytes: int) -> int:
    """Distance between slots whose payload area has slot_bytes."""
    return trailer_offset(slot_bytes) + TRAILER_BYTES


def slot_of(slots: Sequence[int], message_idx: int) -> int:
    """The slot in which message message_idx of a handle lands."""
    return slots[message_idx % len(slots)]


def notification(handle_id: int, message_idx: int) -> bytes:
    """The hint that goes with a write: where to look."""
    return _NOTIFICATION.pack(handle_id, message_idx)


def read_notification(data: bytes) -> tuple[int, int] | None:
    """(handle_id, message_idx) of a hint; None for bytes that are none."""
    if len(data) != _NOTIFICATION.size:
        return None
    handle_id, message_idx = _NOTIFICATION.unpack(data)
    return handle_id, message_idx
