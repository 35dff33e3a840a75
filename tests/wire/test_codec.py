"""Frames: every refusal is a typed WireError, and a byte stream may be cut anywhere."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duomo.errors import WireError
from duomo.wire.codec import CODES, FrameReader, append_frame, asks_of_peers, decode, encode
from duomo.wire.histogram import packed
from duomo.wire.messages import (
    MIN_WIRE_VERSION,
    SINCE,
    WIRE_VERSION,
    Drain,
    Heartbeat,
    Message,
    PrefillDone,
    Refused,
    RingOffered,
    StartPrefill,
    TokensEmitted,
)
from duomo.wire.values import Constraint, PeerAddress, Sampling
from tests.wire.prefill_done import prefill_done

pack = msgspec.msgpack.encode
DONE = prefill_done(packed([[1, 2]]))


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"", "not_msgpack"),
        (b"\xc1", "not_msgpack"),
        (pack({"type": "Heartbeat", "seq": 1})[:-1], "not_msgpack"),
        (pack({"type": "Heartbeat", "seq": 1}) + b"\x00", "not_msgpack"),
        (pack({"type": "TokensEmitted"})[:-1], "not_msgpack"),
        (b"\x82\xa4type\xadTokensEmitted\xa6tokens\xdd\xff\xff\xff\xff", "not_msgpack"),
        (b"\x82\xa4type\xa9Heartbeat\xa1x" + b"\x91" * 100_000, "unknown_field"),
        (pack({"type": "Teleport"}), "unknown_message"),
        (pack({"type": 7}), "unknown_message"),
        (pack({"seq": 1}), "unknown_message"),
        (pack({"type": "Heartbeat", "seq": 1, "colour": 2}), "unknown_field"),
        (pack({"type": "TokensEmitted", "tokens": [{"colour": 1}]}), "unknown_field"),
        (pack({"type": "Heartbeat"}), "bad_field"),
        (pack({"type": "Heartbeat", "seq": "one"}), "bad_field"),
        (pack({"type": "Heartbeat", "seq": 1.5}), "bad_field"),
        (pack({"type": "Refused", "code": "x", "detail": b"bytes"}), "bad_field"),
        (pack({1: 2}), "bad_field"),
        (pack([1, 2]), "bad_field"),
        (b"\x82\xa4type\xa7Refused\xa4code\xa1\xff", "bad_field"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_code(payload: bytes, code: str) -> None:
    with pytest.raises(WireError) as refusal:
        decode(payload)
    assert refusal.value.code == code
    assert len(refusal.value.detail) <= 200


def prefill_of(sampling: Sampling) -> StartPrefill:
    address = PeerAddress(replica_id="d", boot_id="1", address="unix:/d")
    return StartPrefill(
        request_id="r", attempt=0, traceparent="", remaining_s=1.0, prompt_ids=(1,), sampling=sampling, choices=(0,), decode=address
    )


def test_an_older_peer_gets_no_newer_field(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory", "device_idx"):
        monkeypatch.setitem(SINCE, ("RingOffered", name), WIRE_VERSION)
    ring = RingOffered(ring_name="r", agent_metadata=b"", base_address=1, slot_bytes=64, num_slots=1, memory="cuda", device_idx=1)
    older = encode(ring, version=MIN_WIRE_VERSION)
    assert b"device_idx" not in older and b"device_idx" in encode(ring)
    assert decode(older[4:]) == msgspec.structs.replace(ring, memory="host", device_idx=0)
    assert encode(Heartbeat(seq=1), version=MIN_WIRE_VERSION) == encode(Heartbeat(seq=1))


def test_an_older_peer_is_asked_to_sample_as_it_can() -> None:
    plain = prefill_of(Sampling(max_tokens=3, top_k=5))
    older = encode(plain, version=MIN_WIRE_VERSION)
    assert b"prompt_logprobs" not in older and b"constraint" in older and b"prompt_logprobs" in encode(plain)
    assert decode(older[4:]) == plain


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=3, prompt_logprobs=0), Sampling(max_tokens=3, prompt_logprobs=20)])
def test_what_an_older_peer_would_leave_out_of_the_answer_is_never_sent_to_it(sampling: Sampling) -> None:
    out = bytearray(b"before")
    with pytest.raises(WireError) as refusal:
        append_frame(out, prefill_of(sampling), version=MIN_WIRE_VERSION)
    assert refusal.value.code == "peer_too_old" and out == b"before"
    held = Sampling(max_tokens=3, seed=7, constraint=Constraint(kind="regex", text="a+"))
    assert asks_of_peers(sampling) == WIRE_VERSION and asks_of_peers(held) <= MIN_WIRE_VERSION
    assert decode(encode(prefill_of(sampling))[4:]) == prefill_of(sampling)


def test_a_drain_that_an_older_peer_would_end_after_is_never_sent_to_it() -> None:
    assert decode(encode(Drain(deadline_s=1.0), version=4)[4:]) == Drain(deadline_s=1.0)
    with pytest.raises(WireError) as refusal:
        encode(Drain(deadline_s=1.0, ends=False), version=4)
    assert refusal.value.code == "peer_too_old"


def test_a_message_over_the_limit_leaves_the_buffer_as_it_was() -> None:
    out = bytearray(encode(Heartbeat(seq=1)))
    before = bytes(out)
    with pytest.raises(WireError) as refusal:
        append_frame(out, Refused(code="c", detail="x" * 1000), max_frame_bytes=1000)
    assert refusal.value.code == "frame_too_large"
    assert out == before
    with pytest.raises(OverflowError):  # a programmer's fault, and still no half frame
        append_frame(out, Heartbeat(seq=2**64))
    assert out == before


def test_a_header_over_the_limit_is_refused_before_its_bytes_arrive() -> None:
    reader = FrameReader(max_frame_bytes=63)
    with pytest.raises(WireError) as refusal:
        list(reader.payloads((64).to_bytes(4, "big")))
    assert refusal.value.code == "frame_too_large"
    assert list(FrameReader(max_frame_bytes=63).payloads((63).to_bytes(4, "big"))) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 257), max_size=12), st.data())
def test_a_stream_may_be_cut_anywhere(sizes: list[int], data: st.DataObject) -> None:
    messages: list[Message] = [Refused(code=str(size), detail="x" * size) for size in sizes]
    stream = b"".join(encode(message) for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    reader, seen = FrameReader(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        seen += [decode(payload) for payload in reader.payloads(stream[start:stop])]
    assert seen == messages


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_break_the_decoder(noise: bytes) -> None:
    try:
        decode(noise)
    except WireError as refusal:
        assert refusal.code in CODES


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["Heartbeat", "TokensEmitted", "StartPrefill", "Hello", "Nobody"]), st.dictionaries(st.text(max_size=9), _values))
def test_well_formed_nonsense_never_breaks_the_decoder(name: str, fields: dict[str, object]) -> None:
    try:
        decode(pack(fields | {"type": name}))
    except WireError as refusal:
        assert refusal.code in CODES


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_flipped_byte_is_refused_or_gives_a_message(data: st.DataObject) -> None:
    payload = bytearray(encode(DONE)[4:])
    payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert isinstance(decode(bytes(payload)), PrefillDone | Heartbeat | TokensEmitted)
    except WireError as refusal:
        assert refusal.code in CODES
