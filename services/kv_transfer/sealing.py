"""Owns the end of a message in the host's memory: padding and trailer behind its payload. Knows no slot, ring or transport."""

from __future__ import annotations

from services.kv_transfer import layout
from services.kv_transfer.hashing import message_hash
from services.kv_transfer.layout import MessageSpan


def seal(message: memoryview, handle_id: int, span: MessageSpan) -> None:
    """message: all its bytes (layout.message_bytes), the payload already there."""
    payload, end = message[: span.num_bytes], layout.trailer_offset(span.num_bytes)
    message[span.num_bytes : end] = bytes(end - span.num_bytes)
    digest = message_hash(payload, handle_id, span.group, span.message_idx)
    layout.write_trailer(message[end:], layout.trailer_start(handle_id, span), digest)
