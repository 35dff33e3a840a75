"""The wire page against its golden bytes: what travels may only change together with WIRE_VERSION.

Regenerate after a deliberate change: PYTHONPATH=. python tests/wire/test_messages.py --write
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec
import pytest

from duomo.wire import messages as page
from duomo.wire import values
from duomo.wire.codec import decode, encode
from duomo.wire.messages import MIN_WIRE_VERSION, SINCE, WIRE_VERSION, Message

GOLDEN = Path(__file__).parent / "golden"

ADDRESS = values.PeerAddress(replica_id="decode-1", boot_id="00000000000000d1", address="tcp:10.0.0.7:7001")
SAMPLING = values.Sampling(
    max_tokens=64,
    temperature=0.5,
    top_k=40,
    top_p=0.9,
    min_p=0.05,
    seed=2**64 - 1,
    presence_penalty=-1.5,
    frequency_penalty=0.25,
    repetition_penalty=1.1,
    min_tokens=3,
    ignore_eos=True,
    stop_token_ids=(2, 8191),
    logprobs=2,
    constraint=values.Constraint(kind="regex", text="[aé]+"),
    logit_bias=((7, -100.0), (8191, 0.5)),
    prompt_logprobs=0,
)
PLAIN = msgspec.structs.replace(SAMPLING, prompt_logprobs=None)
ABOUT: dict[str, Any] = {
    "request_id": "req-é1",
    "attempt": 1,
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "remaining_s": 29.5,
}
TIMINGS = values.Timings(
    total_s=0.125,
    queue_s=0.0625,
    compute_s=0.03125,
    sample_s=0.015625,
    handoff_exposed_s=0.5,
    admit_s=0.25,
    first_step_s=1.5,
    peer_rtt_s=0.75,
)
HANDLE = values.Handle(
    handle_id=2**40 + 7,
    producer_boot_id="00000000000000a1",
    consumer_boot_id="00000000000000d1",
    model_fingerprint="tiny-moe:5f",
    request_id="req-é1",
    attempt=1,
    ring_name="decode-1/00000000000000d1/0",
    slots=(3, 0, 31),
    num_tokens=257,
    num_blocks=17,
    first_block=2,
)

EXAMPLES: tuple[Message, ...] = (
    page.Hello(
        min_version=1,
        max_version=2,
        boot_id="00000000000000a1",
        replica_id="prefill-0",
        role="prefill",
        model_fingerprint="tiny-moe:5f",
        address="unix:/run/duomo/prefill-0.sock",
        nonce=bytes(range(16)),
        mac=bytes(range(32)),
    ),
    page.Refused(code="unknown_field", detail="Object contains unknown field `x`"),
    page.Heartbeat(seq=257, is_reply=True),
    page.StartPrefill(
        prompt_ids=(1, 127, 128, 8191),
        sampling=SAMPLING,
        choices=(0, 3),
        decode=ADDRESS,
        emitted_ids=(9,),
        cache_salt="tenant-1",
        priority=-1,
        **ABOUT,
    ),
    page.StartDecode(prompt_ids=(1, 127, 128, 8191), sampling=SAMPLING, choices=(0,), prefill=ADDRESS, cache_salt="s", priority=2, **ABOUT),
    page.Resume(prompt_ids=(1, 300), emitted_ids=(5, 6), sampling=SAMPLING, choice=2, prefill=ADDRESS, **ABOUT),
    page.RingOffered(
        ring_name="decode-1/0",
        agent_metadata=b"\x00nixl\xff",
        base_address=0x7F00_0000_1000,
        slot_bytes=1 << 20,
        num_slots=32,
        memory="cuda",
        device_idx=3,
        kv_dtype="fp8_e4m3",
    ),
    page.WaveAnnounced(wave_id=9, num_tokens=257, group_bounds=(0, 2, 4, 6, 8), **ABOUT),
    page.HandleOffered(handle=HANDLE, **ABOUT),
    page.GroupLanded(handle_id=2**40 + 7, group=1, message_idx=5, **ABOUT),
    page.PrefillDone(
        handle_id=2**40 + 7,
        num_messages=8,
        first_token_ids=(77, 78),
        ended_choices=(3,),
        cached_tokens=16,
        expert_histogram=values.ExpertHistogram(num_layers=2, num_experts=1, counts=bytes((44, 1, 0, 0, 255, 255, 255, 127))),
        **ABOUT,
    ),
    page.TransferFenced(handle_id=2**40 + 7, **ABOUT),
    page.PullKv(handle_id=2**40 + 7, group=0, message_idx=2, **ABOUT),
    page.PromptScored(
        scores=values.PromptLogprobs(
            first=1,
            num_tokens=2,
            num_top=1,
            logprobs=struct.pack("<4f", -0.5, -0.5, -2.25, -0.125),
            top_ids=struct.pack("<2i", 127, 8191),
            ranks=struct.pack("<2i", 1, 300),
            float_bytes=4,
        ),
        **ABOUT,
    ),
    page.TokensEmitted(
        tokens=(
            values.EmittedToken(request_id="a", choice=0, attempt=0, index=0, token_id=42, timings=TIMINGS),
            values.EmittedToken(
                request_id="b",
                choice=1,
                attempt=2,
                index=127,
                token_id=8191,
                logprob=values.TokenLogprob(logprob=-0.25, top=((8191, -0.25), (5, -1.75))),
                finish_reason="length",
            ),
        )
    ),
    page.Preempted(choice=1, num_emitted=12, reason="no_blocks", **ABOUT),
    page.RequestFinished(cached_tokens=16, timings=TIMINGS, **ABOUT),
    page.RequestFailed(code="kv_corrupt", phase="kv.handoff", retryable=True, detail="hash of message 3 differs", **ABOUT),
    page.Cancel(reason="client_gone", choice=1, **ABOUT),
    page.Drain(deadline_s=30.0, ends=False),
    page.Undrain(),
    page.FlushCaches(flush_id=2**40 + 7),
    page.CachesFlushed(flush_id=2**40 + 7, num_blocks=257),
    page.ReplicaReport(
        replica_id="decode-1",
        boot_id="00000000000000d1",
        role="decode",
        is_draining=False,
        num_running=3,
        num_queued=1,
        num_queued_tokens=257,
        num_blocks=2048,
        num_free_blocks=2000,
        num_cached_blocks=40,
        num_slots=32,
        num_free_slots=31,
        num_quarantined_slots=1,
        num_open_handles=1,
        num_open_spans=2,
        num_steps=100_000,
        block_tokens=16,
        prefix_digests=(2**63, 7),
        counters={"kv_mismatch": 1},
        progress_age_s=0.5,
        pid=4242,
        transport="nixl/UCX",
        experts=values.ExpertHistogram(num_layers=1, num_experts=2, counts=bytes((7, *[0] * 7, *[255] * 7, 127)), int_bytes=8),
        num_work_tokens=300,
        num_promised_blocks=70_000,
        tokens_per_s=2048.5,
        step_s=0.0625,
        max_choices=300,
    ),
)


def newer_fields(message: Message, version: int) -> set[str]:
    """Of the message itself, than what a peer of this version knows."""
    return {field for (name, field), since in SINCE.items() if name == type(message).__name__ and since > version}


def samples(message: Message) -> bool:
    return isinstance(message, page.StartPrefill | page.StartDecode | page.Resume)


def has_older_form(message: Message, version: int) -> bool:
    return bool(newer_fields(message, version)) or samples(message)


def as_spoken(message: Message, version: int) -> Message:
    if isinstance(message, page.Drain) and version < WIRE_VERSION:
        return msgspec.structs.replace(message, ends=True)  # an older peer ends after each, and is never sent another
    """The example that a peer of this version may be sent: a prompt's log-probabilities are never asked of it."""
    return message if version == WIRE_VERSION or not samples(message) else msgspec.structs.replace(message, sampling=PLAIN)


CASES = [
    (as_spoken(message, version), version)
    for message in EXAMPLES
    for version in range(MIN_WIRE_VERSION, WIRE_VERSION + 1)
    if version == WIRE_VERSION or has_older_form(message, version)
]


def golden_file(message: Message, version: int) -> Path:
    suffix = "" if version == WIRE_VERSION else f".v{version}"
    return GOLDEN / f"{type(message).__name__}{suffix}.hex"


def read_golden(file: Path) -> bytes:
    return bytes.fromhex("".join(file.read_text().split()))


@pytest.mark.parametrize(("message", "version"), CASES, ids=lambda case: case if isinstance(case, int) else type(case).__name__)
def test_golden_bytes(message: Message, version: int) -> None:
    frame = read_golden(golden_file(message, version))
    assert encode(message, version=version) == frame, "the wire changed: raise WIRE_VERSION, list the field in SINCE, regenerate"
    newer = newer_fields(message, version)
    expected = message if not newer else msgspec.structs.replace(message, **{field: _default(message, field) for field in newer})
    assert decode(frame[4:]) == expected


@pytest.mark.parametrize(("message", "version"), CASES, ids=lambda case: case if isinstance(case, int) else type(case).__name__)
def test_golden_bytes_as_another_decoder_reads_them(message: Message, version: int) -> None:
    frame = read_golden(golden_file(message, version))
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    fields = msgpack.unpackb(frame[4:], strict_map_key=False, use_list=False)
    wanted = msgspec.to_builtins(message, builtin_types=(bytes,))
    for field in newer_fields(message, version):
        del wanted[field]
    for (name, field), since in SINCE.items():
        if name == "Sampling" and since > version and samples(message):
            del wanted["sampling"][field]
    assert fields == _tuples(wanted)
    assert fields["type"] == type(message).__name__


def test_every_message_has_golden_bytes_and_nothing_else_has() -> None:
    classes = {message.__name__ for message in get_args(Message)}
    assert classes == {type(message).__name__ for message in EXAMPLES}
    assert {file.name for file in GOLDEN.iterdir()} == {golden_file(*case).name for case in CASES}


def test_examples_set_every_field_so_that_golden_bytes_cover_it() -> None:
    for message in EXAMPLES:
        if isinstance(message, page.Resume):
            continue  # its optional fields are StartDecode's; its example shows defaults on the wire
        for field in msgspec.structs.fields(message):
            assert field.default is msgspec.NODEFAULT or getattr(message, field.name) != field.default, (type(message).__name__, field.name)


def test_newer_fields_exist_and_carry_defaults() -> None:
    for (name, field), since in SINCE.items():
        assert MIN_WIRE_VERSION < since <= WIRE_VERSION
        found = {info.name: info for info in msgspec.structs.fields(getattr(page, name))}[field]
        assert not found.required
    assert WIRE_VERSION - MIN_WIRE_VERSION == 1, "versions N and N-1 are spoken"


def _default(message: Message, field: str) -> object:
    return {info.name: info for info in msgspec.structs.fields(message)}[field].default


def _tuples(value: object) -> object:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list | tuple) else value


def write_golden() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for message, version in CASES:
        text = encode(message, version=version).hex()
        golden_file(message, version).write_text("\n".join(text[at : at + 120] for at in range(0, len(text), 120)) + "\n")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write_golden()
